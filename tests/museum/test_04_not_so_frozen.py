"""Not so frozen: the comment says "all but A and B", the optimizer says otherwise.

One teaching repository freezes the linear layers and embeddings, and leaves every LayerNorm trainable: 38,400 numbers
of GPT-2 (25 norms, a scale and a bias of 768 each) beside the LoRA. Another wraps the weights and never freezes the
base at all. Both train well, so nobody looks.

Found in: labml's annotated LoRA of GPT-2; minLoRA

The lesson: do not list what to freeze. Freeze everything, then make new tensors; and prove it by looking at every
tensor after a few steps.
"""

import torch
from exhibit import caught, loss_of, small_model
from torch import nn

import peft


def forgets_the_norms(model):
    """The wrong way: the kinds of modules that somebody thought of are frozen."""
    peft.attach(model, peft.LoRA(rank=2))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)  # as if never frozen
    return model


def freezes_nothing(model):
    """The wrong way, second sort."""
    return peft.attach(model, peft.LoRA(rank=2)).requires_grad_(True)


def ours(model):
    return peft.attach(model, peft.LoRA(rank=2))


def check_only_a_and_b_move(prepare):
    base, model = small_model(), prepare(small_model())
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for name, p in peft.sites.named_tensors(model).items():
        if name in before:
            assert torch.equal(p, before[name]), f"{name} moved"


def test_frozen_tensors_stay_frozen():
    caught(check_only_a_and_b_move, forgets_the_norms)
    caught(check_only_a_and_b_move, freezes_nothing)
    check_only_a_and_b_move(ours)


def test_the_count_gives_it_away_too():
    recipe, config = peft.LoRA(rank=2), small_model().config
    expected = peft.expected_parameters(config, recipe)
    assert peft.parameter_table(ours(small_model())).trained == expected
    norms = (2 * config.n_layers + 1) * 2 * config.d_model
    assert peft.parameter_table(forgets_the_norms(small_model())).trained == expected + norms
    assert (2 * 12 + 1) * 2 * 768 == 38_400  # the same sum for GPT-2


def test_the_gradient_audit_notices_it():
    for prepare in (forgets_the_norms, freezes_nothing):
        caught(lambda prepare=prepare: peft.gradient_audit(prepare(small_model()), loss_of))
    peft.gradient_audit(ours(small_model()), loss_of)

"""A prompt that is computed once and kept.

The prompt (or the keys and values of a prefix) comes out of a small network. To save work, the module computes it in
the first pass and keeps it. If that pass was an evaluation under `no_grad`, what is kept has no history: from then on
the network gets no gradient, and the loss stands still without a word. If it was a training pass, the second backward
crashes.

Found in: https://github.com/Lightning-AI/litgpt/issues/1287

The lesson: look at gradients *after* an evaluation pass. Ours computes the prefix afresh in every forward pass.
"""

import torch
from exhibit import caught, loss_of, small_model

import peft
from peft.methods.prefix import PrefixAttention


class KeptPrefix(PrefixAttention):
    """The wrong way: the prefix is made in the first pass."""

    kept = None

    def prefix(self):
        if self.kept is None:
            self.kept = super().prefix()
        return self.kept


def model_with_prefix(kept):
    model = peft.attach(small_model(), peft.PrefixTuning(length=3, reparameterize=4))
    if kept:
        for block in model.blocks:
            block.attention.__class__ = KeptPrefix
    return model


def check_gradients_after_an_evaluation(model):
    with torch.no_grad():
        loss_of(model)
    loss = loss_of(model)
    if loss.requires_grad:
        loss.backward()
    for name, p in peft.trainable_parameters(model).items():
        assert p.grad is not None and p.grad.norm() > 0, f"{name} got no gradient"


def check_two_steps(model):
    try:
        for _ in range(2):
            loss_of(model).backward()
    except RuntimeError as error:
        raise AssertionError(f"the second step crashed: {error}") from error


def test_the_wrong_way_learns_nothing_after_an_evaluation_or_crashes_in_step_two():
    caught(check_gradients_after_an_evaluation, model_with_prefix(kept=True))
    caught(check_two_steps, model_with_prefix(kept=True))


def test_ours_learns():
    check_gradients_after_an_evaluation(model_with_prefix(kept=False))
    check_two_steps(model_with_prefix(kept=False))


def test_the_gradient_audit_notices_it():
    caught(lambda: peft.gradient_audit(model_with_prefix(kept=True), loss_of))
    peft.gradient_audit(model_with_prefix(kept=False), loss_of)

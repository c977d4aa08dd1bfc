"""Start, gradients, exact return, counts: what must hold for every method and for several together."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference.kinds import of_kind
from reference.method_cases import (
    RECIPES,
    SETS,
    UNCHANGED_AT_THE_START,
    batch,
    each_of,
    loss_of,
    outputs,
    train_a_little,
)
from reference.tiny_models import KINDS_AND_LLAMA, tiny_of

import peft
from minitransformer import Transformer, TransformerConfig

every_recipe = each_of("recipe", RECIPES)
every_set = each_of("recipes", SETS)


@pytest.fixture(params=KINDS_AND_LLAMA)
def tiny(request):
    """As elsewhere, and the Llama family."""
    return tiny_of(request.param)


def attach_all(model, recipes, seed=0):
    for number, recipe in enumerate(recipes):
        peft.attach(model, recipe, seed=seed + number)
    return model


def layers_of(recipes):
    chosen = [getattr(recipe, "layers", None) for recipe in recipes]
    return (0, 1) if None in chosen else {layer for layers in chosen for layer in layers}


@pytest.mark.parametrize(
    "training", [pytest.param(False, id="eval"), pytest.param(True, id="train", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", UNCHANGED_AT_THE_START)
def test_lora_and_adapters_leave_the_output_bit_equal_at_the_start(tiny, name, training):
    model = tiny().train(training)
    before = outputs(model)
    peft.attach(model, RECIPES[name])
    assert torch.equal(outputs(model), before)
    train_a_little(model)
    assert not torch.allclose(outputs(model), before, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in UNCHANGED_AT_THE_START])
def test_prefixes_and_prompts_change_the_output_at_once(tiny, name):
    model = tiny()
    before = outputs(model)
    assert not torch.allclose(outputs(peft.attach(model, RECIPES[name])), before, atol=1e-3)


def test_even_a_prefix_of_zeros_changes_the_output_because_it_dilutes_the_softmax(tiny):
    model = tiny()
    before = outputs(model)
    peft.attach(model, RECIPES["prefix kv"])
    peft.load_state_dict(model, {name: torch.zeros_like(t) for name, t in peft.state_dict(model).items()})
    assert not torch.allclose(outputs(model), before, atol=1e-3)


@of_kind("encoder-post")
@every_set
@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param(False, id="plain"), pytest.param(True, id="checkpointing", marks=pytest.mark.slow)],
)
def test_declared_tensors_of_every_layer_learn_and_all_others_stay(tiny, recipes, checkpointing):
    """Three real steps, an evaluation pass before and between them; gradients looked at by hand, not by the audit."""
    model = attach_all(tiny(gradient_checkpointing=checkpointing).train(), recipes)
    trained = peft.trainable_parameters(model)
    for layer in layers_of(recipes):
        assert any(name.startswith(f"blocks.{layer}.") for name in trained) or "embedding.prompt" in trained
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # told of every tensor: freezing must not rest on that
    for _ in range(3):
        outputs(model.eval())
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss_of(model).backward()
        optimizer.step()
    for name, p in trained.items():
        assert p.grad is not None and p.grad.norm() > 0, name
        assert not torch.equal(p, start[name]), name
    for name, p in model.named_parameters():
        if name in frozen:
            assert p.grad is None, name
            assert torch.equal(p, frozen[name]), name


@of_kind("encoder-post")
@every_set
def test_gradient_checkpointing_changes_no_gradient(tiny, recipes):
    gradients = []
    for checkpointing in (False, True):
        model = train_a_little(attach_all(tiny(gradient_checkpointing=checkpointing).train(), recipes))
        loss_of(model).backward()
        gradients.append([p.grad for p in peft.trainable_parameters(model).values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


@of_kind("causal-pre")
@every_set
def test_the_audit_agrees_and_leaves_the_model_as_it_was(tiny, recipes):
    model = attach_all(tiny(), recipes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    table = peft.gradient_audit(model, loss_of)
    learning = {row.tensor for row in table.rows if row.gradient_norm is not None}
    assert learning == set(peft.trainable_parameters(model))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert "0 got a gradient, 0 moved" in str(table)


@pytest.mark.slow
@every_set
def test_first_then_second_then_first_again_reproduces_the_first_exactly(tiny, recipes):
    model = tiny()
    base = outputs(model)
    first = outputs(train_a_little(attach_all(model, recipes)))
    kept = peft.state_dict(model)
    peft.detach(model)
    assert torch.equal(outputs(model), base)
    second = (peft.LoRA(rank=1),) if recipes != (peft.LoRA(rank=1),) else (RECIPES["houlsby"],)
    train_a_little(attach_all(model, second, seed=9), seed=8)
    assert not torch.equal(outputs(model), base)
    peft.detach(model)
    assert torch.equal(outputs(model), base)
    attach_all(model, recipes, seed=77)
    peft.load_state_dict(model, kept)
    assert torch.equal(outputs(model), first)


FRESH_PROCESS = """
import sys, torch, peft
from minitransformer import Transformer, TransformerConfig
base, path, expected = sys.argv[1:]
torch.manual_seed(1234)
model = Transformer(TransformerConfig(23, 12, 16, 2, 2, 24, causal=False, norm="post"), seed=99)
model.load_state_dict(torch.load(base, weights_only=True))
peft.load(model.eval(), path)
wanted = torch.load(expected, weights_only=True)
assert torch.equal(model.hidden(wanted["tokens"], wanted["mask"]).detach(), wanted["hidden"]), "outputs differ"
"""


@pytest.mark.slow
def test_a_fresh_process_with_another_seed_reproduces_the_outputs_from_the_file(tmp_path):
    model = Transformer(TransformerConfig(23, 12, 16, 2, 2, 24, causal=False, norm="post"), seed=0).eval()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    train_a_little(attach_all(model, SETS["everything"], seed=3))
    peft.save(model, tmp_path / "methods.safetensors")
    tokens, mask = batch()
    hidden = model.hidden(tokens, mask).detach()
    torch.save({"tokens": tokens, "mask": mask, "hidden": hidden}, tmp_path / "expected.pt")
    files = [str(tmp_path / name) for name in ("base.pt", "methods.safetensors", "expected.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *files], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@of_kind("causal-pre")
@every_recipe
def test_the_same_seed_gives_the_same_tensors_and_the_callers_random_state_is_left_alone(tiny, recipe):
    state = torch.get_rng_state()
    first, again, other = (peft.state_dict(peft.attach(tiny(), recipe, seed=s)) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = not isinstance(recipe, (peft.BitFit, peft.IA3, peft.LNTuning))  # these start from zeros and ones
    assert any(not torch.equal(first[name], other[name]) for name in first) == drawn


def test_a_method_attached_in_training_mode_starts_the_same_whatever_dropout_draws(decoder):
    starts = []
    for seed in (1, 2):
        model = decoder(dropout=0.5).train()
        train_a_little(peft.attach(model, peft.LoRA(rank=2, dropout=0.5, targets=("key", "value"))))
        torch.manual_seed(seed)
        peft.attach(model, RECIPES["prefix kv"])
        starts.append(peft.state_dict(model))
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


@of_kind("causal-pre")
@every_set
def test_state_dict_is_a_copy_named_by_site_and_tensor(tiny, recipes):
    model = attach_all(tiny(), recipes)
    names = peft.state_dict(model).keys()
    assert set(peft.trainable_parameters(model)) <= set(names)
    assert not any("base" in name.split(".") for name in names)
    for tensor in peft.state_dict(model).values():
        tensor.fill_(7.0)
    assert not any(bool((p == 7.0).all()) for p in peft.trainable_parameters(model).values())


@pytest.mark.slow
@every_set
def test_a_deep_copy_is_independent(tiny, recipes):
    model = train_a_little(attach_all(tiny(), recipes))
    before = outputs(model)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), before)
    train_a_little(twin)
    assert torch.equal(outputs(model), before) and not torch.equal(outputs(twin), before)
    peft.detach(twin)
    assert len(peft.attached(model)) == len(recipes) and torch.equal(outputs(model), before)


@of_kind("encoder-post")
@every_set
def test_disabled_computes_the_base_bit_for_bit(tiny, recipes):
    model = tiny()
    base = outputs(model)
    changed = outputs(train_a_little(attach_all(model, recipes)))
    with peft.disabled(model):
        assert torch.equal(outputs(model), base)
        with peft.disabled(model):
            assert torch.equal(outputs(model), base)
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), changed)
    with pytest.raises(RuntimeError, match="ours"), peft.disabled(model):
        raise RuntimeError("ours")
    assert torch.equal(outputs(model), changed)


@pytest.mark.slow
@every_set
def test_the_order_in_which_methods_are_attached_does_not_change_what_they_compute(tiny, recipes):
    forward = train_a_little(attach_all(tiny(), recipes))
    backward = attach_all(tiny(), recipes[::-1])
    peft.load_state_dict(backward, peft.state_dict(forward))
    torch.testing.assert_close(outputs(forward), outputs(backward), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "prefix mlp"])
def test_a_bfloat16_base_keeps_float32_tensors_that_learn(tiny, name):
    model = tiny().to(torch.bfloat16)
    before = outputs(model)
    peft.attach(model, RECIPES[name])
    assert {p.dtype for p in peft.trainable_parameters(model).values()} == {torch.float32}
    if name in UNCHANGED_AT_THE_START:
        assert torch.equal(outputs(model), before)
    peft.gradient_audit(model, lambda m: loss_of(m).float())

"""Every method over a base in 4 bits (QLoRA and its kin): what holds over a plain one holds here."""

import copy
import itertools

import pytest
import torch
from reference.method_cases import (
    RECIPES,
    SETS,
    UNCHANGED_AT_THE_START,
    VARIANTS,
    assert_same,
    batch,
    each_of,
    fingerprint,
    loss_of,
    outputs,
    train_a_little,
)
from reference.tiny_models import LLAMA, tiny_of

import peft
from minitransformer import dequantize, quantize
from minitransformer.quantized_layer import QuantizedLinear
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import fit
from peft import ALL_LINEARS, BitFit, DoRA, LoRA, PrefixTuning, TaskBank, VeRA


def tiny(kind=None, storage="nf4", **changes):
    return quantize(tiny_of(kind or {})(**changes).requires_grad_(False), storage, block=8)


def attach_all(model, recipes):
    for seed, recipe in enumerate(recipes):
        peft.attach(model, recipe, seed=seed)
    return model


KINDS = pytest.mark.parametrize(
    "kind", [pytest.param({}, id="gpt", marks=pytest.mark.slow), pytest.param(LLAMA, id="llama")]
)
each_set = each_of("recipes", SETS)


@KINDS
@each_set
def test_start_training_and_exact_return(kind, recipes, tmp_path):
    model = tiny(kind, dropout=0.0)
    base, modules, before = outputs(model), [*model.modules()], fingerprint(model)
    attach_all(model, recipes)
    names = [name for name, own in SETS.items() if own == recipes]
    if names[0] in UNCHANGED_AT_THE_START:
        assert torch.equal(outputs(model), base)
    stored = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(stored) == 3 * sum(isinstance(module, QuantizedLinear) for module in modules)
    assert all(p.dtype == torch.float32 for p in peft.trainable_parameters(model).values())

    peft.gradient_audit(model, loss_of)  # what is declared learns in every layer, the rest keeps its bits
    trained = outputs(train_a_little(model))
    assert not torch.allclose(trained, base, atol=1e-3)
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters() if name in stored)

    peft.save(model, tmp_path / "method.safetensors")
    assert torch.equal(outputs(peft.load(tiny(kind), tmp_path / "method.safetensors")), trained)
    with peft.disabled(model):
        assert torch.equal(outputs(model), base)
    peft.detach(model)
    assert [*model.modules()] == modules and torch.equal(outputs(model), base)
    assert_same(before, fingerprint(model))


@each_set
def test_the_gradients_are_those_over_the_dequantised_base(recipes):
    """In float64, recomputed or not."""
    found = []
    for quantised, recompute in ((True, False), (True, True), (False, False)):
        model = tiny(LLAMA, gradient_checkpointing=recompute).double()
        model = train_a_little(attach_all(model if quantised else dequantize(model), recipes))
        loss_of(model).backward()
        found.append({name: p.grad for name, p in peft.trainable_parameters(model).items()})
    for own in found[:2]:
        assert own.keys() == found[2].keys()
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, found[2][name], atol=1e-12, rtol=1e-9)


def test_lora_in_one_product_is_its_plain_form_and_keeps_no_weight(monkeypatch):
    layer = train_a_little(peft.attach(tiny().double(), LoRA(rank=2, targets=("up",)))).blocks[0].feedforward.up
    x, found, kept = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1)).double(), [], []
    assert x.numel() > layer.many
    for _ in range(2):
        own = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(own)
        assert (24, 16) not in {tuple(tensor.shape) for tensor in kept}
        y.square().sum().backward()
        found.append([y.detach(), own.grad, layer.A.grad, layer.B.grad])
        layer.A.grad = layer.B.grad = None
        monkeypatch.setattr("peft.methods.lora.is_known", lambda layer, x: False)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


@KINDS
def test_counts_are_of_weights_and_not_of_bytes(kind):
    plain, model = tiny_of(kind)(), tiny(kind)
    for own in (plain, model):
        peft.attach(own, LoRA(rank=2))
    ours, theirs = peft.parameter_table(model), peft.parameter_table(plain)
    assert (ours.trained, ours.base, ours.share) == (theirs.trained, theirs.base, theirs.share)
    assert ours.trained == peft.expected_parameters(model.config, LoRA(rank=2))
    assert {(row.name, row.shape) for row in ours.rows} == {(row.name, row.shape) for row in theirs.rows}
    assert repr(ours) == repr(theirs)


def test_a_file_knows_its_base(tmp_path):
    path = tmp_path / "lora.safetensors"
    peft.save(train_a_little(peft.attach(tiny(), LoRA(rank=2))), path)
    changed = tiny()
    changed.blocks[1].feedforward.up.nf4_codes[3, 3] += 1
    rescaled = tiny()
    rescaled.blocks[1].feedforward.up.nf4_scales[3] += 1
    wide_scales = quantize(tiny_of({})().requires_grad_(False), block=8, double=False)
    others = {
        "float32": tiny_of({})(), "dequantised": dequantize(tiny()), "int4": tiny(storage="int4"), "one code": changed,
        "one scale": rescaled, "scales in 32 bits": wide_scales,
        "float64": tiny().double(),
    }  # fmt: skip
    for name, other in others.items():
        before = outputs(other) if name != "float64" else None
        with pytest.raises(ValueError, match="of another base model"):
            peft.load(other, path)
        assert not peft.attached(other) and (before is None or torch.equal(outputs(other), before)), name
    peft.load(tiny(), path)


def test_copies_casts_and_state_dicts():
    model = train_a_little(attach_all(tiny(), SETS["dora + gated prefix + ia3"]))
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), outputs(model))
    torch.testing.assert_close(outputs(twin.double()).float(), outputs(model))
    other = attach_all(tiny(), SETS["dora + gated prefix + ia3"])
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), outputs(model))


def test_a_base_of_16_bits_has_methods_in_float32():
    model = peft.attach(tiny().bfloat16(), LoRA(rank=2, targets=ALL_LINEARS))
    assert {p.dtype for p in peft.trainable_parameters(model).values()} == {torch.float32}
    assert outputs(train_a_little(model)).dtype == torch.bfloat16
    peft.gradient_audit(model, loss_of)


@pytest.mark.parametrize("recipe", [LoRA(rank=2), DoRA(rank=2), VeRA(rank=4)], ids=lambda recipe: type(recipe).__name__)
def test_merging_is_refused_and_exact_once_dequantised(recipe):
    model = train_a_little(peft.attach(tiny(), recipe))
    before, modules = outputs(model), [*model.modules()]
    for merging in (peft.merge, peft.merged_copy):
        with pytest.raises(ValueError, match=r"attention.query is quantised, .* dequantize\(model\) first"):
            merging(model)
    assert [*model.modules()] == modules and torch.equal(outputs(model), before)
    dequantize(model)
    torch.testing.assert_close(outputs(model), before)
    torch.testing.assert_close(outputs(peft.merged_copy(model)), before)
    torch.testing.assert_close(outputs(peft.merge(model)), before)
    assert not any(p.requires_grad for p in peft.detach(model).parameters())


def test_what_would_train_a_quantised_weight_is_refused_by_name():
    for also in ("query", "blocks.1", "feedforward"):
        model = tiny()
        with pytest.raises(ValueError, match=r"train_also names blocks.\S+, which holds no parameters"):
            peft.attach(model, LoRA(rank=2), train_also=(also,))
        assert not peft.attached(model)
    with pytest.raises(ValueError, match="quantise the plain model, and attach afterwards"):
        quantize(peft.attach(tiny_of({})(), LoRA(rank=2)), block=8)
    with pytest.raises(ValueError, match=r"embedding.* is trained"):
        quantize(peft.attach(tiny_of({})(), peft.PromptTuning(length=2)), block=8)


def test_biases_are_trained_beside_the_codes():
    """BitFit's changes are tensors of its own, so a base in 4 bits may have them."""
    model = peft.attach(tiny(), BitFit())
    base = outputs(model)
    assert not torch.equal(outputs(train_a_little(model)), base)


def test_fit(tmp_path):
    """And a run that is taken up again ends in the same bits."""
    tokens, mask = batch(rows=4)
    rows = Dataset(tokens, mask, torch.tensor([1, 2, 3, 4]))
    ends = []
    for _ in range(2):
        model = peft.attach(tiny(), LoRA(rank=2))
        before = {name: p.clone() for name, p in model.named_parameters()}
        fit(model, rows, steps=3, batch_size=4, progress=False, checkpoint=tmp_path / "run", every=1)
        assert all(torch.equal(p, before[name]) != p.requires_grad for name, p in model.named_parameters())
        ends.append(peft.state_dict(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("recipe", [LoRA(rank=2, targets=ALL_LINEARS), PrefixTuning(length=3), RECIPES["houlsby"]])
def test_generation_is_that_of_the_dequantised_base(recipe):
    model = train_a_little(peft.attach(tiny(LLAMA, max_len=30), recipe))
    tokens = batch()[0]
    words = model.generate(tokens, 12)
    assert torch.equal(words, model.generate(tokens, 12, use_cache=False))
    assert torch.equal(words, dequantize(model).generate(tokens, 12))


def test_a_bank_of_tasks():
    model = tiny(LLAMA)
    tasks = {name: (RECIPES[name],) for name in ("lora all", "prefix kv", "prefix hidden", "houlsby", "inside_ffn")}
    models = {name: train_a_little(attach_all(copy.deepcopy(model), own), seed=i)
              for i, (name, own) in enumerate(tasks.items())}  # fmt: skip
    order = [*tasks, None]
    tokens = torch.randint(23, (len(order), 6), generator=torch.Generator().manual_seed(4))
    bank = TaskBank(copy.deepcopy(model), models)
    logits = bank(tokens, tasks=order)
    for row, task in enumerate(order):
        alone = (model if task is None else models[task])(tokens[row : row + 1])
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pair", itertools.combinations(sorted(set(RECIPES) - VARIANTS), 2), ids=" + ".join)
def test_pairs_are_what_they_are_over_the_dequantised_base(pair):
    try:
        model = train_a_little(attach_all(tiny(LLAMA), [RECIPES[name] for name in pair]))
    except ValueError:
        pytest.skip("these two cannot stand beside each other")
    plain = dequantize(copy.deepcopy(model))
    torch.testing.assert_close(outputs(model), outputs(plain), atol=1e-5, rtol=1e-5)

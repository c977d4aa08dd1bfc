"""PiSSA and LoftQ: against NumPy and Hugging Face's peft; what holds for every LoRA holds for these."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.method_cases import assert_same, fingerprint, loss_of, outputs, train_a_little
from safetensors.torch import load_file

import peft
from minitransformer import Transformer, TransformerConfig, dequantize, quantize
from minitransformer.code_book import packed, unpacked
from minitransformer.heads import SequenceClassifier
from minitransformer.quantized_layer import QuantizedLinear
from peft import ALL_LINEARS, DoRA, LoRA, PrefixTuning, attach, attach_loftq, attach_pissa, combine
from peft.methods.starts import loftq, pissa, principal_factors

GOLDEN = load_file(Path(__file__).parents[1] / "reference" / "huggingface_starts.safetensors")
RECIPE = LoRA(rank=4, alpha=6.0, targets=("query", "up"))
ROUNDED = {
    "pissa nf4": (attach_pissa, "nf4", {}),
    "pissa int4": (attach_pissa, "int4", {}),
    "loftq nf4": (attach_loftq, "nf4", {"steps": 1}),
    "loftq int4": (attach_loftq, "int4", {"steps": 1}),
    "loftq nf4, 3 steps": (attach_loftq, "nf4", {"steps": 3}),
}
each_rounded = pytest.mark.parametrize(
    ("start", "storage"),
    [
        pytest.param(functools.partial(start, storage=storage, **options), storage, id=name)
        for name, (start, storage, options) in ROUNDED.items()
    ],
)


def model(seed=0, **changes):
    """As small as blocks of 64 weights allow."""
    sizes = {"vocab_size": 23, "max_len": 12, "d_model": 64, "n_heads": 2, "n_layers": 2, "d_ff": 128}
    return Transformer(TransformerConfig(**(sizes | changes)), seed).eval()


def layers(started):
    return {name: wrapper for name, (wrapper,) in peft.sites.all_wrappers(started).items()}


def twin_of_factors(W, rank, scale):
    """Without a scale first, then shared out evenly."""
    U, S, Vh = np.linalg.svd(W)
    sign = [np.sign(row[np.abs(row).argmax()]) for row in Vh[:rank]]
    A = [s * np.sqrt(own) * row for s, own, row in zip(sign, S, Vh, strict=False)]
    B = [s * np.sqrt(own) * column for s, own, column in zip(sign, S, U.T, strict=False)]
    root = np.sqrt(abs(scale))
    return np.stack(A) / root, np.sign(scale) * np.stack(B, axis=1) / root


def twin_of_loftq(W, rank, scale, q, steps):
    update = np.zeros_like(W)
    for _ in range(steps):
        rest = W - update
        A, B = twin_of_factors(W - q(rest), rank, scale)
        update = scale * B @ A
    return rest, A, B


@pytest.mark.parametrize("scale", [0.5, 3.0, -2.0])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (7, 7)])
def test_both_equal_their_numpy_twins(shape, scale):
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rest, A, B = pissa(W, 3, scale)
    twins = twin_of_factors(W.numpy(), 3, scale)
    for ours, twin in zip((A, B, rest), (*twins, W.numpy() - scale * twins[1] @ twins[0]), strict=True):
        np.testing.assert_allclose(ours.numpy(), twin, atol=1e-12)
    found = loftq(W, 3, scale, lambda M: (2 * M).round() / 2, steps=3)
    for ours, twin in zip(found, twin_of_loftq(W.numpy(), 3, scale, lambda M: np.round(2 * M) / 2, 3), strict=True):
        np.testing.assert_allclose(ours.numpy(), twin, atol=1e-12)


def test_pissa_equals_hugging_faces():
    rest, A, B = pissa(GOLDEN["weight"], 3, 5 / 3)
    torch.testing.assert_close(rest, GOLDEN["pissa/residual"], rtol=0, atol=5e-5)  # they compute in float32
    sign = (A * GOLDEN["pissa/A"]).sum(dim=1).sign()
    torch.testing.assert_close(sign[:, None] * A, GOLDEN["pissa/A"], rtol=0, atol=5e-5)
    torch.testing.assert_close(sign * B, GOLDEN["pissa/B"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_loftq_equals_hugging_faces_with_their_rounding(steps):
    """That of bitsandbytes, of which ours without double quantisation is a twin."""

    def q(W):
        return unpacked("nf4", **packed(W, "nf4", 64, double=False))

    rest, A, B = loftq(GOLDEN["weight"], 3, 1.0, q, steps)
    torch.testing.assert_close(q(rest), GOLDEN[f"loftq {steps}/Q"], rtol=0, atol=5e-5)
    torch.testing.assert_close(B @ A, GOLDEN[f"loftq {steps}/B"] @ GOLDEN[f"loftq {steps}/A"], rtol=0, atol=5e-5)


def test_the_signs_are_fixed_and_the_factors_equally_long():
    W = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    A, B = principal_factors(W, 5, 0.5)
    flipped, _ = principal_factors(-W, 5, 0.5)
    assert bool((A.gather(1, A.abs().argmax(dim=1, keepdim=True)) > 0).all())
    torch.testing.assert_close(flipped, A)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"alpha": -3.0}, {"rank_stabilized": True}, {"train": ("B",)}, {"layers": (1,)}, {"targets": ALL_LINEARS},
     {"rank": 64}],
    ids=str,
)  # fmt: skip
def test_pissa_starts_as_the_model_it_was_given(changes):
    recipe = LoRA(**({"rank": 4, "alpha": 6.0} | changes))
    original, started = model().double(), attach_pissa(model().double(), recipe)
    torch.testing.assert_close(outputs(started), outputs(original), rtol=1e-10, atol=1e-10)
    names = {f"{name}.{factor}" for name in layers(started) for factor in recipe.train}
    assert set(peft.trainable_parameters(started)) == names
    assert peft.attached(started)[0].method == recipe
    peft.gradient_audit(started, loss_of)


def test_the_first_gradients_are_those_of_the_weight():
    """dL/dA = s Bᵀ G and dL/dB = s G Aᵀ, with G = dL/dW of the original: neither factor waits for the other."""
    original, started = model().double(), attach_pissa(model().double(), RECIPE)
    loss_of(original).backward()
    loss_of(started).backward()
    for name, layer in layers(started).items():
        G = original.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.A.grad, layer.scale * layer.B.T @ G, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.B.grad, layer.scale * G @ layer.A.T, rtol=1e-9, atol=1e-12)
        assert layer.base.weight.grad is None and layer.A.grad.norm() > 0 < layer.B.grad.norm()


def test_off_and_detached_it_is_the_residual_that_computes():
    original, started = model(), attach_pissa(model(), RECIPE)
    rests = {}
    for name, module in original.named_modules():
        if name.endswith((".query", ".up")):
            rests[name], A, B = pissa(module.weight.detach(), 4, 1.5)
            assert torch.equal(layers(started)[name].A, A) and torch.equal(layers(started)[name].B, B)
    expected = model()
    with torch.no_grad():
        for name, rest in rests.items():
            expected.get_submodule(name).weight.copy_(rest)
    assert len(rests) == 4
    with peft.disabled(started):
        assert torch.equal(outputs(started), outputs(expected))
    peft.detach(started)
    assert torch.equal(outputs(started), outputs(expected)) and not torch.equal(outputs(started), outputs(original))
    assert all(p.requires_grad for p in started.parameters())


def test_half_precision_keeps_the_factors_in_float32():
    started = attach_pissa(model().bfloat16(), RECIPE)
    layer = layers(started)["blocks.0.attention.query"]
    assert layer.base.weight.dtype == torch.bfloat16 and layer.A.dtype == layer.B.dtype == torch.float32
    W = model().bfloat16().blocks[0].attention.query.weight.float()
    assert (layer.changed_weight() - W).abs().max() <= 2**-8 * layer.base.weight.abs().max()


@each_rounded
def test_every_target_starts_nearer_to_its_weight_than_rounding_leaves_it(start, storage):
    original, started, plain = model(), start(model(), RECIPE), quantize(model().requires_grad_(False), storage)
    for name, layer in layers(started).items():
        W = original.get_submodule(name).weight
        assert (W - layer.changed_weight()).norm() < (W - plain.get_submodule(name).weight).norm(), name
    quantised = {name for name, module in plain.named_modules() if isinstance(module, QuantizedLinear)}
    assert {*layers(started)} < quantised == {name for name in quantised if is_quantised(started, name)}
    for name in quantised - {*layers(started)}:
        assert torch.equal(started.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert (outputs(started) - outputs(original)).norm() < (outputs(plain) - outputs(original)).norm()
    peft.gradient_audit(started, loss_of)


def is_quantised(model, name):
    return isinstance(peft.sites.named_sites(model)[name], QuantizedLinear)


@each_rounded
def test_what_is_frozen_is_what_the_equations_round(start, storage):
    layer = layers(start(model(), RECIPE))["blocks.1.feedforward.up"]
    W = model().blocks[1].feedforward.up.weight.detach()

    def q(rest):
        return unpacked(storage, **packed(rest, storage, 64, double=True))

    by_hand = loftq(W, 4, 1.5, q, start.keywords["steps"]) if start.func is attach_loftq else pissa(W, 4, 1.5)
    for found, expected in zip((layer.base.weight, layer.A, layer.B), (q(by_hand[0]), *by_hand[1:]), strict=True):
        assert torch.equal(found, expected)


@each_rounded
def test_files_are_of_the_base_that_the_start_made(start, storage, tmp_path):
    trained = train_a_little(start(model(), RECIPE))
    peft.save(trained, tmp_path / "file")
    twin = peft.load(start(model(), RECIPE), tmp_path / "file")
    assert torch.equal(outputs(twin), outputs(trained))
    peft.detach(twin)
    assert torch.equal(outputs(peft.load(twin, tmp_path / "file")), outputs(trained))
    rounded = quantize(model().requires_grad_(False), storage)
    if start.keywords.get("steps") == 1:  # Q = q(W)
        assert torch.equal(outputs(peft.load(rounded, tmp_path / "file")), outputs(trained))
    for other in [model()] + [rounded] * (start.keywords.get("steps") != 1):
        before = fingerprint(other)
        with pytest.raises(ValueError, match="another base model"):
            peft.load(other, tmp_path / "file")
        assert_same(before, fingerprint(other))


def test_merging_a_float_base_and_refusing_a_rounded_one():
    started = train_a_little(attach_pissa(model().double(), RECIPE))
    unmerged = outputs(started)
    torch.testing.assert_close(outputs(peft.merge(started)), unmerged, rtol=1e-10, atol=1e-10)
    assert torch.equal(outputs(peft.unmerge(started)), unmerged)
    rounded = train_a_little(attach_loftq(model(), RECIPE))
    with pytest.raises(ValueError, match=r"quantised.*dequantize"):
        peft.merge(rounded)
    unmerged = outputs(rounded)
    torch.testing.assert_close(outputs(peft.merge(dequantize(rounded))), unmerged, rtol=1e-4, atol=1e-4)


def test_what_was_learned_is_an_update_of_the_original_of_twice_the_rank():
    started = attach_pissa(model().double(), RECIPE)
    start = RECIPE, peft.state_dict(started)
    train_a_little(started)
    wider, tensors = combine([(RECIPE, peft.state_dict(started)), start], [1.0, -1.0])
    shared = attach(model().double(), wider)
    peft.load_state_dict(shared, tensors)
    assert wider.rank == 8
    torch.testing.assert_close(outputs(shared), outputs(started), rtol=1e-9, atol=1e-9)


def test_a_head_is_trained_beside_either():
    for start in (attach_pissa, attach_loftq):
        classifier = SequenceClassifier(model(causal=False), n_classes=3, pool="mean")
        started = start(classifier, RECIPE, train_also=("head",))
        assert {"head.weight", "head.bias"} < {*peft.trainable_parameters(started)}
        other = SequenceClassifier(model(causal=False), n_classes=3, pool="mean")
        plain = attach(other, RECIPE, train_also=("head",))
        assert {*peft.trainable_parameters(started)} == {*peft.trainable_parameters(plain)}


def with_nan(own):
    own.blocks[1].attention.query.weight.data[0, 0] = torch.nan
    return own


def tied(own):
    own.blocks[1].attention.query.weight = own.blocks[0].attention.query.weight
    return own


def with_prefix(own):
    return attach(own, PrefixTuning(length=2))


REFUSED = {
    "dora": (lambda: model(), DoRA(rank=4), {}, "plain LoRA"),
    "dropout": (lambda: model(), LoRA(rank=4, dropout=0.1), {}, "plain LoRA with dropout=0.0"),
    "attached": (lambda: with_prefix(model()), RECIPE, {}, "detach"),
    "rank": (lambda: model(), LoRA(rank=65), {}, "exceeds"),
    "targets": (lambda: model(), LoRA(rank=4, targets=("gate",)), {}, "matches no linear layer"),
    "train_also": (lambda: model(), RECIPE, {"train_also": ("top",)}, "matches no module"),
    "a NaN": (lambda: with_nan(model()), RECIPE, {}, "NaN"),
    "tied": (lambda: tied(model()), RECIPE, {}, "shared with another"),
    "rounded": (lambda: quantize(model().requires_grad_(False)), RECIPE, {}, "quantised already"),
    "rounded and trained": (lambda: model(), RECIPE, {"storage": "nf4", "train_also": ("down",)}, "can be trained"),
    "outside of blocks": (
        lambda: model(causal=False, lm_head="bert"), LoRA(rank=4, targets=("query", "dense")), {"storage": "nf4"},
        "head.dense is in no block",
    ),
    "storage": (lambda: model(), RECIPE, {"storage": "nf3"}, "nf3"),
    "a layer beside": (lambda: model(d_ff=96), LoRA(rank=4), {"storage": "nf4"}, "down"),
}  # fmt: skip
REFUSED_BY_LOFTQ = {"steps": (lambda: model(), RECIPE, {"steps": 0}, "steps=0 must be a whole number, at least 1")}


@pytest.mark.parametrize(
    ("start", "made", "recipe", "options", "message"),
    [
        pytest.param(start, *case, id=f"{start.__name__} {name}")
        for start, cases in ((attach_pissa, REFUSED), (attach_loftq, REFUSED | REFUSED_BY_LOFTQ))
        for name, case in cases.items()
    ],
)
def test_what_cannot_be_is_refused_and_nothing_has_changed(start, made, recipe, options, message):
    own = made()
    before = fingerprint(own)
    with pytest.raises(ValueError, match=message):
        start(own, recipe, **options)
    after = fingerprint(own)
    if "NaN" in message:
        before, after = ([part if i != 1 else {} for i, part in enumerate(p)] for p in (before, after))
    assert_same(before, after)


def test_a_weight_that_cannot_change_is_refused():
    own = model()
    layer = own.blocks[1].attention.query
    with torch.inference_mode():
        layer.weight = torch.nn.Parameter(layer.weight.clone())
    with pytest.raises(ValueError, match="of inference mode"):
        attach_pissa(own, RECIPE)
    assert not peft.attached(own) and own.blocks[1].attention.query is layer


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.linalg.LinAlgError])
@pytest.mark.parametrize(("start", "storage"), [(attach_pissa, None), (attach_pissa, "nf4"), (attach_loftq, "int4")])
def test_after_an_interruption_nothing_has_changed(start, storage, error, monkeypatch):
    own, svd, seen = model(), torch.linalg.svd, []
    own.norm.requires_grad_(False)
    own.blocks[1] = torch.compile(own.blocks[1], backend="eager")
    before = fingerprint(own)

    def interrupted(*args, **options):
        seen.append(1)
        if len(seen) == 3:
            raise error
        return svd(*args, **options)

    monkeypatch.setattr("torch.linalg.svd", interrupted)
    with pytest.raises(error):
        start(own, RECIPE, storage=storage)
    assert_same(before, fingerprint(own))


def test_an_alpha_that_makes_the_factors_overflow_is_refused():
    for start in (attach_pissa, attach_loftq):
        own = model()
        before = fingerprint(own)
        with pytest.raises(ValueError, match=r"too large for torch\.float32; choose alpha nearer to the rank"):
            start(own, LoRA(rank=4, alpha=1e-90))
        assert_same(before, fingerprint(own))


def test_without_a_rounding_loftq_has_nothing_to_correct(unchecked):
    own = model()
    before = fingerprint(own)
    with pytest.raises(ValueError, match="corrects a rounding"):
        attach_loftq(own, RECIPE, storage=None)
    with pytest.raises(ValueError, match=r"steps=1\.5 must be a whole number, at least 1"):
        attach_loftq(own, RECIPE, steps=1.5)
    with pytest.raises(ValueError, match="plain LoRA"):
        attach_loftq(own, PrefixTuning(length=2))
    assert_same(before, fingerprint(own))


@each_rounded
def test_detach_makes_trainable_what_was_and_is_not_rounded(start, storage):
    own = model()
    before = {name for name, p in own.named_parameters() if p.requires_grad}
    after = {name for name, p in peft.detach(start(own, RECIPE)).named_parameters() if p.requires_grad}
    rounded = {name for name in before if name.startswith("blocks.") and name.endswith("weight") and "norm" not in name}
    assert rounded and after == before - rounded


def test_detach_after_dequantize_makes_trainable_what_was():
    own = quantize(model().requires_grad_(False))
    trained = {"blocks.0.attention.query.bias", "norm.weight"}
    for name in trained:
        own.get_parameter(name).requires_grad_(True)
    attach(own, LoRA(rank=2))
    dequantize(own)
    assert {name for name, p in peft.detach(own).named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("storage", [["nf4"], "nf5", None], ids=str)
def test_an_unknown_storage_is_refused_in_a_sentence(storage, unchecked):
    with pytest.raises(ValueError, match=r"is unknown; choose one of nf4, int4"):
        quantize(model().requires_grad_(False), storage)

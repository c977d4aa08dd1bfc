"""Frozen weights in 4 bits: the code book, packing and unpacking, the layer that unpacks, and whole models."""

import copy
import math
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.random_weights import randomize
from reference.tiny_models import LLAMA, SIZES, tiny_of
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from minitransformer import SequenceClassifier, Transformer, TransformerConfig, dequantize, quantize, stored_bytes
from minitransformer.code_book import BOOKS, PAIRS, packed, unpacked
from minitransformer.quantized_layer import QuantizedLinear

PAPER = [  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight, bias=None, storage="nf4", block=8, double=True):
    """The weight in a quantised layer."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = bias if bias is None else nn.Parameter(bias)
    return QuantizedLinear(partial(unpacked, storage), packed(weight, storage, block, double), plain)


def tiny(kind=None, block=8, **changes):
    return quantize(tiny_of(kind or {})(**changes).requires_grad_(False), block=block)


TOKENS = torch.randint(23, (3, 6), generator=torch.Generator().manual_seed(1))


def test_nf4_is_derived_as_in_the_paper():
    assert BOOKS["nf4"].tolist() == pytest.approx(PAPER, abs=1e-6)
    assert BOOKS["nf4"][[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    assert BOOKS["int4"][1:].tolist() == pytest.approx([i / 7 for i in range(-7, 8)])


def test_the_books_do_not_depend_on_the_default_precision():
    own, source = {}, Path(sys.modules["minitransformer.code_book"].__file__).read_text()
    torch.set_default_dtype(torch.float64)
    try:
        exec(source, own)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(own["BOOKS"][name], book) for name, book in BOOKS.items())
    assert all(torch.equal(own["PAIRS"][name], both) for name, both in PAIRS.items())


def twin(weight, book, block, double):
    """In NumPy and one weight at a time: bytes of the codes, and the weights they stand for."""
    blocks = weight.numpy().reshape(-1, block)
    scales = np.abs(blocks).max(axis=1)
    zero = np.argmin(np.abs(book))
    pairs = zip(blocks, scales, strict=True)
    codes = np.array([[np.argmin(np.abs(w - c * book)) if c else zero for w in own] for own, c in pairs])
    if double:
        mean = scales.mean()
        for start in range(0, len(scales), 256):
            group = scales[start : start + 256] - mean
            step = np.abs(group).max() / 127
            scales[start : start + 256] = mean + step * np.round(group / step)
    out = (book[codes] * scales[:, None]).reshape(weight.shape)
    flat = codes.reshape(len(weight), -1)
    return flat[:, 0::2] * 16 + flat[:, 1::2], out


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("storage", ["nf4", "int4"])
@pytest.mark.parametrize(("shape", "block"), [((5, 24), 8), ((3, 128), 64), ((70, 64), 8)])  # 15, 6 and 560 scales
def test_packing_and_unpacking_against_a_numpy_twin(storage, double, shape, block):
    weight = drawn(*shape)
    weight[1, :block] = 0.0
    stored = packed(weight, storage, block, double)
    codes, values = twin(weight, BOOKS[storage].numpy(), block, double)
    assert {tensor.dtype for tensor in stored.values()} == {torch.uint8}
    back = unpacked(storage, *stored.values())
    assert not back[1, :block].any()
    assert np.array_equal(stored["codes"].numpy(), codes)
    np.testing.assert_allclose(back.numpy(), values, atol=2e-6)


@pytest.mark.parametrize("storage", ["nf4", "int4"])
def test_what_the_book_can_say_is_kept(storage):
    """Weights that lie on the book come back, so packing again changes nothing."""
    weight = packed(drawn(8, 64), storage, 32, double=False)
    once = unpacked(storage, *weight.values())
    assert torch.equal(unpacked(storage, *packed(once, storage, 32, double=False).values()), once)


def expected_error(book, block):
    """Of a weight drawn from N(0, 1): the mean square, by integration over the largest |w| of its block, c.

    The others are then normal between -c and c, and the largest itself is exact.
    """
    c = np.linspace(1e-3, 7.0, 700)
    within = np.array([math.erf(x / math.sqrt(2)) for x in c])
    density = block * within ** (block - 1) * 2 * np.exp(-(c**2) / 2) / math.sqrt(2 * math.pi)  # of the largest
    w = np.linspace(-1, 1, 1_001)
    missed = np.min(np.abs(w[:, None] - book[None]), axis=1) ** 2
    normal = np.exp(-((c[:, None] * w[None]) ** 2) / 2) / math.sqrt(2 * math.pi)
    square = c**3 * np.trapezoid(normal * missed[None], w, axis=1) / within
    return (block - 1) / block * np.trapezoid(density * square, c)


@pytest.mark.parametrize("block", [32, 64])
def test_the_error_is_what_integration_over_normal_weights_predicts(block):
    weight, found = drawn(1_000, 512), {}
    for storage in ("nf4", "int4"):
        back = unpacked(storage, *packed(weight, storage, block, double=False).values())
        found[storage] = (back - weight).square().mean().item()
        assert found[storage] == pytest.approx(expected_error(BOOKS[storage].double().numpy(), block), rel=0.01)
    assert found["nf4"] < 0.85 * found["int4"]
    doubly = unpacked("nf4", *packed(weight, "nf4", block, double=True).values())
    assert (doubly - weight).square().mean().item() == pytest.approx(found["nf4"], rel=0.005)


def test_bytes():
    single, double = (layer_of(drawn(48, 512), block=64, double=double) for double in (False, True))
    assert single.bits == 4 + 32 / 64
    assert double.bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.01)  # and one mean
    model = tiny_of({})()
    before = stored_bytes(model)
    assert before == 4 * sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    scales = linear // 8 + 12 * 2 * 4  # a byte each; of each layer one step and one mean
    assert stored_bytes(quantize(model.requires_grad_(False), block=8)) == before - 4 * linear + linear // 2 + scales
    assert "5.25 bits a weight" in repr(model.blocks[0].attention.query)


@pytest.mark.parametrize("storage", ["nf4", "int4"])
def test_the_layer_computes_w_x_plus_b_and_its_gradients(storage):
    layer = layer_of(drawn(10, 24), drawn(10, seed=1), storage).double()
    x, g = drawn(2, 3, 24, seed=2).double().requires_grad_(), drawn(2, 3, 10, seed=3).double()
    W = layer.weight.numpy()
    y = layer(x)
    np.testing.assert_allclose(y.detach().numpy(), x.detach().numpy() @ W.T + layer.bias.detach().numpy(), atol=1e-12)
    layer.bias.requires_grad_()
    layer(x).backward(g)
    np.testing.assert_allclose(x.grad.numpy(), g.numpy() @ W, atol=1e-12)
    np.testing.assert_allclose(layer.bias.grad.numpy(), g.numpy().sum((0, 1)), atol=1e-12)
    layer.bias.grad = None
    layer(x[0, 0]).backward(g[0, 0])  # a row alone
    np.testing.assert_allclose(layer.bias.grad.numpy(), g[0, 0].numpy(), atol=0)
    assert all(tensor.grad is None for tensor in layer.stored)
    few = layer_of(drawn(3, 8), drawn(3), storage).double()
    x = drawn(2, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(few, (x,))
    assert torch.autograd.gradgradcheck(lambda x: few(x).tanh(), (x,))


def test_the_backward_pass_keeps_bytes_and_no_weight():
    layer, x = layer_of(drawn(10, 24)), drawn(3, 24).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert len(kept) == 3 and {tensor.dtype for tensor in kept} == {torch.uint8}


def test_function_transforms():
    layer = layer_of(drawn(3, 24), drawn(3, seed=1))
    plain = dequantize(nn.ModuleList([copy.deepcopy(layer)]))[0]
    x = drawn(4, 24, seed=2)
    for apply in (
        lambda own: torch.func.vmap(own)(x),
        lambda own: torch.func.grad(lambda x: own(x).tanh().sum())(x),
        lambda own: torch.func.vmap(torch.func.grad(lambda x: own(x).tanh().sum()))(x),
    ):
        torch.testing.assert_close(apply(layer), apply(plain))


@pytest.mark.parametrize("kind", [{}, {"causal": False, "norm": "post"}, LLAMA])
def test_a_model_computes_what_its_dequantised_twin_computes(kind):
    model = tiny(kind)
    plain = dequantize(copy.deepcopy(model))
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == len(model.blocks) * (6 + ("gated" in kind))
    assert type(model.embedding.token) is nn.Embedding
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not any(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=0, rtol=0)
    if kind.get("causal", True):
        assert torch.equal(model.generate(TOKENS, 5), plain.generate(TOKENS, 5))
        assert torch.equal(model.generate(TOKENS, 5), model.generate(TOKENS, 5, use_cache=False))


def test_in_larger_blocks_of_a_trained_size_little_changes():
    """What rounding costs here: far less than what another draw of the weights would change."""
    plain = randomize(Transformer(TransformerConfig(**(SIZES | {"d_model": 64, "d_ff": 128}))), std=0.1)
    before = plain(TOKENS)
    after = quantize(plain.requires_grad_(False))(TOKENS)
    assert 0 < (after - before).std() < 0.2 * before.std()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_what_is_below(checkpointing):
    gradients = []
    for quantised in (True, False):
        model = tiny(LLAMA, gradient_checkpointing=checkpointing)
        model = model if quantised else dequantize(model)
        model.embedding.token.weight.requires_grad_()
        model(TOKENS).logsumexp(-1).sum().backward()
        assert all(p.grad is None for name, p in model.named_parameters() if name != "embedding.token.weight")
        gradients.append(model.embedding.token.weight.grad)
    torch.testing.assert_close(*gradients)


def test_casts_change_what_comes_out_and_not_what_is_stored():
    model = tiny()
    before, layer = copy.deepcopy(model.state_dict()), model.blocks[0].attention.query
    weight, stored = layer.weight, [tensor.clone() for tensor in layer.stored]
    assert torch.equal(model.double().blocks[0].attention.query.weight, weight.double())
    assert model(TOKENS).dtype == torch.float64
    half = model.bfloat16()
    assert torch.equal(layer.weight, weight.bfloat16()) and half(TOKENS).dtype == torch.bfloat16
    assert all(map(torch.equal, layer.stored, stored))
    model.load_state_dict(before)
    assert torch.equal(model.float().blocks[0].attention.query.weight, weight)


def test_autocast():
    layer = layer_of(drawn(10, 24), drawn(10, seed=1))
    plain = dequantize(nn.ModuleList([copy.deepcopy(layer)]))[0]
    found = []
    for own in (layer, plain):
        x = drawn(3, 24, seed=2).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = own(x)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.02)


def test_state_dict_copies_and_pickles():
    model, other = tiny(), quantize(randomize(tiny_of({})(), seed=3).requires_grad_(False), block=8)
    assert not torch.equal(model(TOKENS), other(TOKENS))
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(TOKENS), model(TOKENS))
    with pytest.raises(RuntimeError, match=r"query\.weight"):
        model.load_state_dict(tiny_of({})().state_dict())
    with pytest.raises(RuntimeError, match=r"query\.int4_codes"):  # codes of another book
        quantize(tiny_of({})().requires_grad_(False), "int4", block=8).load_state_dict(model.state_dict())


@pytest.mark.parametrize("change", [dequantize, lambda model: quantize(dequantize(model), block=8)])
def test_a_change_in_inference_mode_leaves_a_model_that_can_be_trained(change):
    model = tiny()
    with torch.inference_mode():
        change(model)
    model.embedding.token.weight.requires_grad_()
    model(TOKENS).logsumexp(-1).sum().backward()
    assert model.embedding.token.weight.grad.isfinite().all()


def test_what_is_noted_on_a_layer_and_watches_it_goes_over():
    model = tiny()
    layer, seen = model.blocks[0].attention.query, []
    layer.noted = "here"
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    plain = dequantize(model).blocks[0].attention.query
    model(torch.tensor([[1, 2]]))
    handle.remove()
    model(torch.tensor([[1, 2]]))
    assert seen == [1] and plain.noted == "here" and vars(plain).keys() - vars(nn.Linear(1, 1)).keys() == {"noted"}


def test_a_weight_cannot_be_set_nor_trained():
    layer = tiny().blocks[0].attention.query
    for value in (torch.zeros(16, 16), nn.Parameter(torch.zeros(16, 16))):
        with pytest.raises((AttributeError, KeyError), match="weight"):
            layer.weight = value
    with pytest.raises(RuntimeError, match="floating point"):
        tiny().requires_grad_(True)


def test_a_classifier_is_quantised_in_its_blocks():
    model = SequenceClassifier(tiny_of({})(), n_classes=2).requires_grad_(False)
    quantize(model, block=8)
    assert type(model.head) is nn.Linear and type(model.transformer.blocks[1].feedforward.up) is QuantizedLinear


def shared(model):
    model.blocks[1].attention.key.weight = model.blocks[0].attention.key.weight


def twice(model):
    model.blocks[1].attention.key = model.blocks[0].attention.key


def infinite(model):
    model.blocks[1].feedforward.down.weight[3, 3] = math.inf


def too_large(model):
    model.double().blocks[1].feedforward.down.weight[3, 3] = 1e300


def almost_infinite(model):
    model.blocks[1].feedforward.down.weight[:, ::8] = 3e38


def wrapped(model):
    model.blocks[1].attention.key = nn.Sequential(model.blocks[1].attention.key)


def pruned(model):
    prune.l1_unstructured(model.blocks[1].attention.key, "weight", 3)


@pytest.mark.parametrize(
    ("damage", "options", "said"),
    [
        (None, {"storage": "fp4"}, "storage='fp4' is unknown; choose one of nf4, int4"),
        (None, {"block": 64}, "block=64 must be an even number that divides d_in = 16 of blocks.0.attention.query"),
        (None, {"block": 16}, "divides d_in = 24 of blocks.0.feedforward.down"),
        (None, {"block": 0}, "block=0 must be a whole number, at least 2"),
        (None, {"block": 7}, "block=7 must be an even number"),
        (lambda m: m.norm.requires_grad_(), {}, r"norm.weight is trained, .* model.requires_grad_\(False\)"),
        (shared, {}, "weight of blocks.0.attention.key is shared with another module"),
        (twice, {}, "weight of blocks.0.attention.key is shared with another module"),
        (infinite, {}, "weight of blocks.1.feedforward.down holds a NaN or an infinity"),
        (almost_infinite, {}, "weight of blocks.1.feedforward.down holds a NaN or an infinity, or nearly one"),
        (too_large, {}, "weight of blocks.1.feedforward.down holds a NaN or an infinity"),
        (wrapped, {}, "blocks.1.attention.key is a Sequential"),
        (
            lambda m: prune.l1_unstructured(m.blocks[1].attention.key, "weight", 3),
            {},
            "blocks.1.attention.key is pruned",
        ),
        (lambda m: m.blocks[1].attention.key.register_forward_hook(print), {}, "watched by a hook"),
    ],
)
def test_what_cannot_be_quantised_is_refused_and_nothing_changes(damage, options, said):
    model = tiny_of({})().requires_grad_(False)
    if damage:
        damage(model)
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=said):
        quantize(model, **({"block": 8} | options))
    assert [id(module) for module in model.modules()] == before


def test_a_pass_that_is_traced_leaves_nothing_behind():
    """What is made of tensors without values may not be kept for those that have some."""
    model, stored = tiny(), tiny().blocks[0].attention.query.stored
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.blocks[0].attention.query.unpack(*stored)
    torch.testing.assert_close(model(TOKENS), dequantize(copy.deepcopy(model))(TOKENS))


def test_options_of_another_type_are_refused(unchecked):
    for options in ({"block": 8.0}, {"block": True}, {"double": "no"}, {"double": None}):
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
            quantize(tiny_of({})().requires_grad_(False), **({"block": 8} | options))


def test_other_refusals():
    with pytest.raises(ValueError, match="quantised already; dequantize"):
        quantize(tiny(), block=8)
    with pytest.raises(ValueError, match="no blocks of linear layers"):
        quantize(nn.Linear(8, 8).requires_grad_(False))
    with pytest.raises(ValueError, match="nothing is quantised"):
        dequantize(tiny_of({})())
    assert type(dequantize(tiny().blocks[0].attention.query)) is nn.Linear
    assert F.mse_loss(dequantize(tiny()).blocks[0].attention.query.weight, tiny().blocks[0].attention.query.weight) == 0


@pytest.mark.parametrize(("case", "block"), [("nf4", 64), ("larger blocks", 128)])
def test_bitsandbytes_says_the_same(case, block):
    """Golden output of another implementation (reference/make_bitsandbytes_golden.py)."""
    golden = load_file(Path(__file__).parents[1] / "reference" / "bitsandbytes.safetensors")
    torch.testing.assert_close(BOOKS["nf4"], golden["book"], atol=1e-6, rtol=0)
    weight = golden[f"{case}/weight"]
    stored = packed(weight, "nf4", block, double=False)
    assert torch.equal(stored["scales"].view(torch.float32), golden[f"{case}/scales"])
    assert torch.equal(stored["codes"].flatten(), golden[f"{case}/codes"])
    torch.testing.assert_close(unpacked("nf4", *stored.values()), golden[f"{case}/unpacked"], atol=1e-7, rtol=0)
    doubly = unpacked("nf4", *packed(weight, "nf4", block, double=True).values())  # integers for the scales, not floats
    ours, theirs = ((own - golden[f"{case}/unpacked"]).norm() for own in (doubly, golden[f"{case}/doubly unpacked"]))
    assert ours < 1.3 * theirs < 0.01 * weight.norm()

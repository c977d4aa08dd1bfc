"""A Llama in the blocks of a GGUF file: the weights are those of the format's own library, to the last bit."""

import copy

import numpy as np
import pytest
import torch
from reference.gguf_files import V, weights, write
from torch import nn

import peft
from minitransformer import dequantize, quantize, stored_bytes
from minitransformer.fast import loss as fast_loss
from minitransformer.pretrained.gguf_file import gguf_llama
from minitransformer.pretrained.gguf_quantized import gguf_quantized, q4_1, q8_0
from minitransformer.pretrained.llama import from_llama
from minitransformer.quantized_layer import QuantizedEmbedding, QuantizedLinear

gguf = pytest.importorskip("gguf")

Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
TOKENS = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "unpack"), [(Q4_1, q4_1), (Q8_0, q8_0)])
def test_unpacking_is_that_of_the_library(kind, unpack):
    rows = gguf.quantize(np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32), kind)
    assert torch.equal(unpack(torch.from_numpy(rows)), torch.from_numpy(gguf.dequantize(rows, kind)))


def test_unpacking_block_by_block_in_numpy():
    """From the bytes, as the head of the file says."""
    row = np.random.default_rng(1).integers(0, 256, 40, dtype=np.uint8)
    row[[1, 3, 21, 23]] = [36, 35, 37, 180]  # scales and minima that are finite
    expected = []
    for block in row.reshape(2, 20):
        d, m = block[:4].view(np.float16).astype(np.float32)
        expected += [d * q + m for q in [*(block[4:] % 16), *(block[4:] // 16)]]
    assert q4_1(torch.from_numpy(row)[None])[0].tolist() == pytest.approx(expected)


@pytest.fixture(params=["Q4_1", "Q8_0"])
def path(request, tmp_path):
    return write(tmp_path / "m.gguf", weights(), gguf.GGMLQuantizationType[request.param])


def test_it_is_the_model_that_dequantised_weights_give(path):
    model, plain = gguf_quantized(path), from_llama(*gguf_llama(path))
    assert model.config == plain.config and not model.training
    assert {type(m) for m in model.blocks.modules() if isinstance(m, nn.Linear)} == {QuantizedLinear}
    assert type(model.embedding.token) is QuantizedEmbedding
    assert not any(p.requires_grad for p in model.parameters())
    for (name, ours), theirs in zip(model.named_modules(), plain.modules(), strict=True):
        if hasattr(ours, "weight"):
            assert torch.equal(ours.weight, theirs.weight), name
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert torch.equal(model.embedding(TOKENS), plain.embedding(TOKENS))
    assert torch.equal(model.generate(TOKENS, 8), plain.generate(TOKENS, 8))
    torch.testing.assert_close(model.loss(TOKENS, TOKENS), plain.loss(TOKENS, TOKENS))
    with pytest.raises(ValueError, match="tokens range from"):
        model(TOKENS + V)
    back = dequantize(copy.deepcopy(model))
    assert type(back.embedding.token) is nn.Embedding and torch.equal(back(TOKENS), plain(TOKENS))


def test_bytes_are_those_of_the_file(path):
    kind = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    model = gguf_quantized(path)
    assert stored_bytes(model) == sum(int(tensor.n_bytes) for tensor in kind.values())
    assert model.embedding.token.bits in (5.0, 8.5)


@pytest.mark.parametrize("rows", [1, 5, V, 2 * V])
def test_the_head_is_the_same_whatever_part_of_the_table_is_unpacked_at_a_time(path, monkeypatch, rows):
    monkeypatch.setattr("minitransformer.quantized_layer.PART", rows)
    model, plain = gguf_quantized(path).double(), from_llama(*gguf_llama(path)).requires_grad_(False).double()
    hidden = torch.randn(3, 7, model.config.d_model, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    hidden.requires_grad_()

    def loss(own, h):
        return torch.logsumexp(own.lm_head(h), dim=-1).sum()

    torch.testing.assert_close(model.lm_head(hidden), plain.lm_head(hidden))
    first, second = (torch.autograd.grad(loss(own, hidden), hidden, create_graph=True)[0] for own in (model, plain))
    torch.testing.assert_close(first, second)
    again, expected = (torch.autograd.grad(g.square().sum(), hidden)[0] for g in (first, second))
    torch.testing.assert_close(again, expected)
    each = torch.func.vmap(torch.func.grad(lambda h: loss(model, h)))(hidden.detach())
    torch.testing.assert_close(each, first.detach())


@pytest.mark.parametrize("rows, words", [(1, 1), (4, 5), (100, V), (3, 100)])
def test_the_loss_unpacks_the_words_of_a_tile_alone(path, monkeypatch, rows, words):
    model, plain = gguf_quantized(path).double(), from_llama(*gguf_llama(path)).requires_grad_(False).double()
    hidden = torch.randn(21, model.config.d_model, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    expected = nn.functional.cross_entropy(plain.lm_head(hidden.requires_grad_()), TOKENS.flatten())
    for name, value in {"ROWS": rows, "WORDS": words}.items():
        monkeypatch.setattr(fast_loss, name, value)
    monkeypatch.setattr(QuantizedEmbedding, "scores", None)  # the other way
    loss, correct = model.word_loss(hidden, TOKENS.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))
    assert correct == (plain.lm_head(hidden).argmax(dim=-1) == TOKENS.flatten()).sum()


def test_another_precision_and_casts(path):
    half, model = gguf_quantized(path, torch.bfloat16), gguf_quantized(path)
    assert torch.equal(half(TOKENS), model.to(torch.bfloat16)(TOKENS)) and half(TOKENS).dtype == torch.bfloat16
    model.float()
    assert torch.equal(model.blocks[0].attention.query.weight, gguf_quantized(path).blocks[0].attention.query.weight)


def test_what_is_not_quantised_stays_plain(tmp_path):
    """A file in float32, and a head of its own, which is no linear layer."""
    plain = gguf_quantized(write(tmp_path / "m.gguf", weights()))
    assert not any(isinstance(m, (QuantizedLinear, QuantizedEmbedding)) for m in plain.modules())
    own = weights() | {"lm_head.weight": weights(1)["model.embed_tokens.weight"]}
    path = write(tmp_path / "head.gguf", own, Q8_0)
    assert torch.equal(gguf_quantized(path)(TOKENS), from_llama(*gguf_llama(path))(TOKENS))


def test_norms_may_be_quantised_and_a_weight_that_is_not_finite_is_refused(tmp_path):
    """As where the file is dequantised."""
    norm = gguf.quantize(weights()["model.norm.weight"], Q8_0)
    tensors = {name: own for name, own in weights().items() if name != "model.norm.weight"}

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self):
            self.add_tensor("output_norm.weight", norm, raw_dtype=Q8_0)
            super().write_header_to_file()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gguf, "GGUFWriter", Writer)
        path = write(tmp_path / "m.gguf", tensors, Q8_0)
        tensors["model.layers.1.mlp.up_proj.weight"][5, 40] = np.inf
        damaged = write(tmp_path / "damaged.gguf", tensors, Q4_1)
    assert torch.equal(gguf_quantized(path)(TOKENS), from_llama(*gguf_llama(path))(TOKENS))
    for read in (gguf_quantized, lambda own: from_llama(*gguf_llama(own))):
        with pytest.raises(ValueError, match=r"'layers.1.mlp.up_proj.weight' has values that are not finite"):
            read(damaged)


def test_who_watches_the_head_sees_it(path):
    model = gguf_quantized(path)
    expected = model(TOKENS) / 2
    model.head.register_forward_hook(lambda *arguments: arguments[-1] / 2)
    assert torch.equal(model(TOKENS), expected)
    targets = TOKENS.flatten()
    loss, _ = model.word_loss(model.hidden(TOKENS).flatten(0, 1), targets)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected.flatten(0, 1), targets))


def test_the_table_is_never_unpacked_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("minitransformer.quantized_layer.PART", 5)
    own = weights() | {"lm_head.weight": weights(1)["model.embed_tokens.weight"]}
    tied, untied = (gguf_quantized(write(tmp_path / f"{len(w)}.gguf", w, Q8_0)) for w in (weights(), own))
    monkeypatch.setattr(QuantizedEmbedding, "weight", property(lambda own: pytest.fail("unpacked")))
    for model in (tied, untied):
        peft.attach(peft.attach(model, peft.PrefixTuning(length=3)), peft.PromptTuning(length=3))
        model.loss(TOKENS, TOKENS).backward()
        model.generate(TOKENS, 4)


@pytest.mark.parametrize(
    "recipe", [peft.LoRA(rank=2, targets=(*peft.ALL_LINEARS, "gate")), peft.PromptTuning(length=3),
               peft.PrefixTuning(length=3, init="normal"), peft.IA3()], ids=lambda recipe: type(recipe).__name__,
)  # fmt: skip
def test_methods_over_the_file(path, recipe, tmp_path):
    model, plain = peft.attach(gguf_quantized(path), recipe), peft.attach(from_llama(*gguf_llama(path)), recipe)
    for own in (model, plain):
        own.double().loss(TOKENS, TOKENS).backward()
        assert own.generate(TOKENS, 3).shape == (3, 10)
    for name, ours in peft.trainable_parameters(model).items():
        torch.testing.assert_close(ours.grad, peft.trainable_parameters(plain)[name].grad)
    model.float()
    assert peft.parameter_table(model).base == peft.parameter_table(plain).base
    peft.gradient_audit(model, lambda own: own.loss(TOKENS, TOKENS))
    peft.save(model, tmp_path / "file")
    peft.load(gguf_quantized(path), tmp_path / "file")
    with pytest.raises(ValueError, match="another base model"):
        peft.load(from_llama(*gguf_llama(path)), tmp_path / "file")
    with pytest.raises(ValueError, match="quantised already"):
        quantize(peft.detach(model))

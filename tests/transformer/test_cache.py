"""The KV cache: it holds what came in its order, and padding is noted from when it occurs."""

import dataclasses
import itertools

import pytest
import torch
from reference.method_cases import train_a_little

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.attention import recorded
from minitransformer.cache import KVCache, LayerCache

CONFIG = TransformerConfig(vocab_size=23, max_len=40, d_model=16, n_heads=2, n_layers=2, d_ff=24)


def pieces(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, 4, generator=generator) for length in lengths]


@pytest.mark.parametrize("lengths", [(1,), (5, 1, 1, 1, 1, 1, 1, 1), (1, 1, 7, 2), (3, 0, 2)], ids=str)
def test_what_grows_is_what_came_in_its_order(lengths):
    layer, keys, values = LayerCache(), pieces(*lengths), pieces(*lengths, seed=1)
    for number, (key, value) in enumerate(zip(keys, values, strict=True), start=1):
        layer.append(key, value)
        assert torch.equal(layer.key, torch.cat(keys[:number], dim=2))
        assert torch.equal(layer.value, torch.cat(values[:number], dim=2))


def test_gradients_pass_through_a_cache_to_all_that_came():
    came, layer, total = [piece.requires_grad_() for piece in pieces(2, 1, 1)], LayerCache(), 0.0
    for piece in came:
        layer.append(piece, piece)
        total = total + layer.key.square().sum()  # every version is used, as attention uses it
    for times, piece, got in zip((3, 2, 1), came, torch.autograd.grad(total, came), strict=True):
        torch.testing.assert_close(got, 2 * times * piece)


def test_a_layer_keeps_keys_and_values_apart():
    layer, (keys, values) = LayerCache(), pieces(3, 3, seed=1)
    assert layer.key is None and layer.value is None
    layer.append(keys, values)
    assert torch.equal(layer.key, keys) and torch.equal(layer.value, values)


def test_attention_weights_behind_a_cache_are_rows_of_those_of_the_whole_text():
    model, tokens = Transformer(CONFIG).eval(), torch.tensor([[3, 1, 4, 1, 5]])
    whole, cache = model.attention_weights(tokens), KVCache(2)
    with recorded(model) as weights:
        model.hidden(tokens[:, :3], cache=cache)
        model.hidden(tokens[:, 3:], cache=cache)
    for layer, (first, second) in enumerate(zip(weights[:2], weights[2:], strict=True)):
        torch.testing.assert_close(first, whole[layer][:, :, :3, :3])
        torch.testing.assert_close(second, whole[layer][:, :, 3:])


def test_without_padding_nothing_is_noted():
    cache = KVCache(1)
    assert cache.is_empty and cache.extend(3, None) is None and cache.extend(1, None) is None
    assert cache.n_keys == 4 and not cache.is_empty


@pytest.mark.parametrize("known", list(itertools.product([True, False], repeat=3)), ids=str)
def test_padding_is_noted_from_when_it_occurs(known):
    cache = KVCache(1)
    masks = [torch.tensor([[False, True], [True, True]]), torch.tensor([[True], [False]]), torch.ones(2, 3).bool()]
    expected = [mask if said else torch.ones_like(mask) for mask, said in zip(masks, known, strict=True)]
    for mask, said in zip(masks, known, strict=True):
        real = cache.extend(mask.shape[1], mask if said else None)
    if any(known):
        assert torch.equal(real, torch.cat(expected, dim=1))
    else:
        assert real is None
    assert cache.n_keys == 6


def test_the_newest_of_all_words_needs_no_mask(monkeypatch):
    model, seen = Transformer(CONFIG).eval(), []
    attend = type(model.blocks[0].attention).attend
    monkeypatch.setattr(
        type(model.blocks[0].attention),
        "attend",
        lambda own, q, k, v, mask: seen.append(mask) or attend(own, q, k, v, mask),
    )
    cache = KVCache(len(model.blocks))
    for n_new in (5, 1, 1):
        model.hidden(torch.randint(23, (2, n_new)), cache=cache)
    assert [mask is None for mask in seen] == [False] * 2 + [True] * 4


@pytest.mark.parametrize("padded", [0, 3])
def test_long_generation_is_the_same_with_and_without_the_cache(padded):
    torch.manual_seed(0)
    model, tokens = Transformer(CONFIG, seed=1), torch.randint(23, (3, 6))
    real = torch.ones(3, 6, dtype=torch.bool)
    real[1, :padded] = False
    expected = model.generate(tokens, 30, padding_mask=real, use_cache=False)
    assert torch.equal(model.generate(tokens, 30, padding_mask=real), expected)
    alone = model.generate(tokens[1:2, padded:], 30)
    assert torch.equal(alone[:, 6 - padded :], expected[1:2, 6:])


@pytest.mark.parametrize("cuts", [(5,), (1, 2), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("targets", [("query",), ("key",), ("value",), ("query", "key", "value")], ids=str)
@pytest.mark.parametrize("attention", ["fused", "written_out"])
def test_gradients_through_a_cache_are_those_of_the_whole_text(attention, targets, cuts):
    model = Transformer(dataclasses.replace(CONFIG, attention=attention)).double()
    train_a_little(peft.attach(model, peft.LoRA(rank=2, targets=targets)))
    trained = list(peft.trainable_parameters(model).values())
    tokens = torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(0))
    cache = KVCache(2)
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.tensor_split(cuts, dim=1)], dim=1)
    whole = model(tokens)
    torch.testing.assert_close(pieces, whole, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(out.square().sum(), trained) for out in (pieces, whole)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_a_cache_of_another_depth_is_refused(n_layers):
    with pytest.raises(ValueError, match=f"the cache has {n_layers} layers and no rows yet, the model 2 layers"):
        Transformer(CONFIG)(torch.tensor([[3, 1, 4]]), cache=KVCache(n_layers))


def test_other_rows_are_refused_and_the_cache_stays():
    model, cache = Transformer(CONFIG).eval(), KVCache(2)
    tokens = torch.tensor([[3, 1, 4, 1], [2, 7, 1, 8]])
    model(tokens[:, :3], cache=cache)
    with pytest.raises(ValueError, match=r"the cache has 2 layers and 2 rows, .* there are 1 rows of tokens"):
        model(tokens[:1, 3:], cache=cache)
    torch.testing.assert_close(model(tokens[:, 3:], cache=cache), model(tokens)[:, 3:])


def test_blocks_that_are_added_or_taken_out_are_cached_too():
    model, tokens = Transformer(CONFIG).eval(), torch.tensor([[3, 1, 4]])
    for blocks in ([*model.blocks, *Transformer(CONFIG, seed=1).blocks], model.blocks[:1]):
        model.blocks = torch.nn.ModuleList(blocks)
        assert torch.equal(model.generate(tokens, 12), model.generate(tokens, 12, use_cache=False))

import numpy as np
import pytest
import torch
from reference import numpy_transformer
from reference.tiny_models import LLAMA, tiny_of

from minitransformer.cache import KVCache
from minitransformer.position import in_front, rotary, rotated

POSITIONS = torch.tensor([[0, 1, 2, 5, 90], [3, 3, 4, 0, 7]])


def heads(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("theta", [10_000.0, 50.0])
def test_each_pair_is_turned_by_its_angle(theta):
    x = heads(2, 3, 5, 8)
    ours = rotated(x, *rotary(POSITIONS, 8, theta))
    for row in range(2):
        for head in range(3):
            expected = numpy_transformer.rotated(x[row, head].numpy(), POSITIONS[row].tolist(), theta)
            np.testing.assert_allclose(ours[row, head], expected, atol=1e-5)  # angles are float32


def test_gradients_are_turned_back():
    x, angles = heads(2, 3, 5, 8).requires_grad_(), rotary(POSITIONS, 8, 10_000.0)
    assert torch.autograd.gradcheck(rotated, (x, *(part.double() for part in angles)))
    turned = rotated(x, *angles)
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)  # R is a turn: R^T R x = x


def test_scores_depend_on_how_far_apart_they_are():
    q, k = heads(1, 2, 5, 8), heads(1, 2, 5, 8, seed=1)
    scores = [
        rotated(q, *rotary(places, 8, 100.0)) @ rotated(k, *rotary(places, 8, 100.0)).mT
        for places in (torch.arange(5)[None], torch.arange(40, 45)[None])
    ]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)
    assert not torch.allclose(scores[0], q @ k.mT, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_precision_is_kept(dtype):
    assert rotated(heads(2, 3, 5, 8).to(dtype), *rotary(POSITIONS, 8, 10_000.0)).dtype == dtype


def test_a_cache_keeps_turned_keys_of_the_heads_that_there_are():
    model, tokens = tiny_of(LLAMA)(), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    real, cache = torch.tensor([[True] * 4, [False, False, True, True]]), KVCache(2)
    model(tokens, real, cache=cache)
    first = model.blocks[0]
    key = first.attention.key(first.norm_attention(model.embedding(tokens, real))).view(2, 4, 1, 8).transpose(1, 2)
    places = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])  # from the first real token on
    expected = rotated(key, *rotary(places, 8, 10_000.0))
    assert cache.layers[0].key.shape == cache.layers[0].value.shape == (2, 1, 4, 8)
    torch.testing.assert_close(cache.layers[0].key[0], expected[0])
    torch.testing.assert_close(cache.layers[0].key[1, :, 2:], expected[1, :, 2:])


def test_keys_in_front_are_those_of_a_text_that_goes_on():
    attention = tiny_of(LLAMA)().blocks[0].attention
    keys = torch.randn(1, 3, 8)
    expected = rotated(keys[:, None], *rotary(torch.tensor([[-3, -2, -1]]), 8, 10_000.0))
    torch.testing.assert_close(in_front(attention, keys), expected[:, 0])
    plain = tiny_of({})().blocks[0].attention
    assert in_front(plain, keys) is keys


def test_a_text_that_is_too_long_is_refused_without_a_table_as_well():
    model = tiny_of(LLAMA)()
    assert model.embedding.room == 12
    with pytest.raises(ValueError, match="13 positions, but max_len is 12; shorten the text"):
        model(torch.ones(1, 13, dtype=torch.long))

import math

import numpy as np
import pytest
import torch
from reference.numpy_transformer import attention_of_one_head
from reference.random_weights import randomize

from minitransformer import TransformerConfig
from minitransformer.attention import (
    Attention,
    attention_mask,
    attention_weights,
    fused_attention,
    written_out,
    written_out_attention,
)
from minitransformer.cache import LayerCache

B, H, T, S, D = 2, 3, 5, 5, 4
CONFIG = TransformerConfig(vocab_size=5, max_len=9, d_model=12, n_heads=3, n_layers=1, d_ff=8)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv():
    return [normal(B, H, n, D, seed=i).requires_grad_() for i, n in enumerate((T, S, S))]


def masks():
    """None, causal, padding on the right, both."""
    real = torch.arange(S) < torch.tensor([5, 3])[:, None]
    return {
        "none": None,
        "causal": attention_mask(T, None, S, causal=True),
        "padding": attention_mask(T, real, S, causal=False),
        "both": attention_mask(T, real, S, causal=True),
    }


@pytest.mark.parametrize("name", masks())
def test_written_out_equals_fused_in_values_and_gradients(name):
    results = []
    for attend in (written_out_attention, fused_attention):
        tensors = qkv()
        out = attend(*tensors, masks()[name])
        results.append([out, *torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", masks())
def test_rows_of_attention_weights_sum_to_1_and_hidden_keys_get_0(name):
    q, k, _ = qkv()
    mask = masks()[name]
    weights = attention_weights(q, k, mask)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    if mask is not None:
        assert weights.masked_select(~written_out(mask, k)).abs().max() == 0


@pytest.mark.parametrize("causal", [True, False])
def test_attention_agrees_with_the_formula_in_numpy(causal):
    q, k, v = (x.detach() for x in qkv())
    mask = attention_mask(T, None, S, causal)
    out, weights = written_out_attention(q, k, v, mask), attention_weights(q, k, mask)
    expected = attention_of_one_head(*(x[1, 2].numpy() for x in (q, k, v)), causal)
    np.testing.assert_allclose(out[1, 2], expected[0], atol=1e-12)
    np.testing.assert_allclose(weights[1, 2], expected[1], atol=1e-12)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
def test_heads_of_queries_share_keys_and_values(n_kv_heads, name):
    """As if the shared ones were there once for each; gradients add up. Ainslie et al. 2023, section 2.2."""
    mask, group = masks()[name], 6 // n_kv_heads
    q = normal(B, 6, T, D)
    results = []
    for attend in (written_out_attention, fused_attention, None):
        k, v = (normal(B, n_kv_heads, S, D, seed=seed).requires_grad_() for seed in (1, 2))
        if attend is None:  # head by head
            heads = [
                written_out_attention(q[:, h, None], k[:, h // group, None], v[:, h // group, None], mask)
                for h in range(6)
            ]
            out = torch.cat(heads, dim=1)
        else:
            out = attend(q, k, v, mask)
        results.append([out, *torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), [k, v])])
    for ours in results[:2]:
        for got, expected in zip(ours, results[2], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_dropout_falls_on_the_weights_and_keeps_their_mean():
    q, k, v = (torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 4000, 1), torch.ones(1, 1, 4000, 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = written_out_attention(q, k, v, dropout=0.25)
    assert 1e-4 < abs(out.item() - 1.0) < 0.05  # the sum of 4000 dropped and rescaled weights: spread 0.009


def test_the_mask_shows_the_past_the_real_keys_and_oneself():
    real = torch.tensor([[False, True, True, False]])
    x = attention_mask(4, real, 4, causal=True)[0, 0].int().tolist()
    assert x == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    x = attention_mask(4, real, 4, causal=False)[0, 0].int().tolist()
    assert x == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_the_queries_of_a_mask_are_the_last_keys():
    full = torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(attention_mask(2, None, 4, causal=True)[0, 0], full[2:])


def test_an_encoder_without_padding_needs_no_mask():
    assert attention_mask(4, None, 4, causal=False) is None


def test_only_a_whole_triangle_is_known_as_one():
    assert attention_mask(4, None, 4, causal=True) == "causal"
    real = torch.ones(1, 4, dtype=torch.bool)
    others = [attention_mask(2, None, 4, causal=True), attention_mask(4, real, 4, causal=True)]
    assert all(isinstance(mask, torch.Tensor) for mask in others)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_triangle_is_left_to_the_kernel_and_changes_no_value(monkeypatch, dropout):
    kernel, asked = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: asked.append(k) or kernel(*a, **k)
    )
    outs = []
    for mask in ("causal", torch.ones(T, T, dtype=torch.bool).tril()[None, None]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outs.append(fused_attention(*qkv(), mask, dropout))
    assert asked[0].get("attn_mask") is None and asked[0]["is_causal"] and asked[1]["attn_mask"] is not None
    torch.testing.assert_close(*outs, atol=1e-12, rtol=0)


def attention_and_input(**changes):
    config = TransformerConfig(**(CONFIG.__dict__ | changes))
    return randomize(Attention(config)).double(), normal(B, T, 12, seed=3)


def learned(attention, n=2):
    """A cache that holds n keys and values of no token."""
    cache = LayerCache()
    cache.append(*(attention.split_heads(normal(1, n, 12, seed=seed).expand(B, -1, -1)) for seed in (4, 5)))
    return cache


def test_a_context_stands_in_front_of_the_keys_and_values_of_the_input():
    attention, x = attention_and_input()
    cache = learned(attention)
    q, (k, v) = attention.split_heads(attention.query(x)), attention.keys_and_values(x)
    heads = written_out_attention(q, torch.cat([cache.key, k], dim=2), torch.cat([cache.value, v], dim=2))
    expected = attention.output(heads.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(attention(x, None, cache), expected)
    assert cache.key.shape[2] == 2 + T


def test_the_two_implementations_of_the_module_agree_with_padding_and_a_context():
    fused, x = attention_and_input(attention="fused")
    written, _ = attention_and_input(attention="written_out")
    mask = attention_mask(T, torch.arange(T) < torch.tensor([5, 2])[:, None], T, causal=True)
    mask = torch.nn.functional.pad(mask, (2, 0), value=True)
    torch.testing.assert_close(fused(x, mask, learned(fused)), written(x, mask, learned(written)), atol=1e-6, rtol=0)


def test_scores_are_divided_by_the_root_of_the_head_width():
    q = torch.full((1, 1, 1, 16), 1.0)
    k = torch.stack([torch.ones(16), torch.zeros(16)])[None, None]
    ratio = torch.log(attention_weights(q, k)[0, 0, 0]).diff().item()
    assert math.isclose(ratio, -16 / 4, rel_tol=1e-6)


def test_a_wrong_shape_is_refused_by_the_shape_checks():
    from jaxtyping import TypeCheckError

    q, k, v = (x.detach() for x in qkv())
    with pytest.raises(TypeCheckError):
        fused_attention(q, k, v[:, :, :-1])
    with pytest.raises(TypeCheckError):
        Attention(CONFIG)(torch.zeros(T, 12))

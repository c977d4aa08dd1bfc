"""Checkers of notebook 01."""

import math

import torch

from exercises.verdict import called, checker, require, same
from minitransformer import Transformer, TransformerConfig


@checker
def check_causal_attention(attention) -> str:
    """attention(q, k, v) [T, d_head] each -> [T, d_head], no query looking ahead."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(3))

    def attend(divisor=math.sqrt(8), causal=True, axis=-1):
        scores = q @ k.T / divisor
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        return scores.softmax(axis) @ v

    hints = {
        "the scores are not divided by sqrt(d_head): the softmax is too sharp": attend(divisor=1.0),
        "the scores are divided by d_head, not by its root": attend(divisor=8.0),
        "every query still sees the words after it: set those scores to -inf before the softmax": attend(causal=False),
        "the softmax runs over the queries; each query's weights over the keys must sum to 1": attend(axis=-2),
        "the mask comes after the softmax, so the weights no longer sum to 1: set the scores to -inf before it":
            (q @ k.T / math.sqrt(8)).softmax(-1).tril() @ v,
        "a score of 0 is not a closed door, since exp(0) is 1: set the scores to -inf":
            (q @ k.T / math.sqrt(8)).tril().softmax(-1) @ v,
    }  # fmt: skip
    got = called(attention, q, k, v)
    others = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(5, 5).triu(0).bool(), -math.inf).softmax(-1) @ v
    require(
        tuple(got.shape) != (5, 8) or not torch.allclose(got[1:].double(), others[1:]),
        "a word may look at itself: hide only what stands *after* it",
    )
    same(got, attend(), hints, "the output")
    huge = called(attention, 1e3 * q, k, v)
    require(bool(torch.isfinite(huge).all()), "with large scores the output holds a NaN; torch's softmax avoids that")
    return "each query's weights sum to 1, and none looks ahead."


@checker
def check_block_parameters(block_parameters) -> str:
    """block_parameters(d_model, d_ff): how many parameters one pre-norm block has, biases and norms included."""
    for d, d_ff in ((128, 512), (12, 40)):
        attention, feedforward = 4 * d * d, 2 * d * d_ff
        config = TransformerConfig(vocab_size=8, max_len=8, d_model=d, n_heads=4, n_layers=1, d_ff=d_ff)
        expected = sum(p.numel() for p in Transformer(config).blocks[0].parameters())
        hints = {
            "the biases are missing, and the norms": attention + feedforward,
            "the norms are missing: two of them, each with a gain and a bias": expected - 4 * d,
            "the biases of the linear layers are missing": attention + feedforward + 4 * d,
            "a norm has two vectors, a gain and a bias": expected - 2 * d,
            "attention has four square maps: query, key, value and output": expected - d * d - d,
        }
        same(called(block_parameters, d, d_ff), expected, hints, f"the count for d_model={d}, d_ff={d_ff}")
    return "the formula gives what is in the model."


@checker
def check_cache_numbers(cache_numbers) -> str:
    """cache_numbers(n_layers, d_model, words): how many numbers a KV cache holds after so many words."""
    for layers, d, words in ((4, 128, 10), (96, 12288, 2048)):
        expected = 2 * layers * d * words
        hints = {
            "keys *and* values are kept": expected // 2,
            "every layer keeps keys and values of its own": 2 * d * words,
            "one word is in the cache for each word that was read": 2 * layers * d,
        }
        same(called(cache_numbers, layers, d, words), expected, hints, f"the count for {layers} layers of {d}")
    return "and a prefix of n words has exactly as many: that is notebook 03."

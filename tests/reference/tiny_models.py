"""Tiny models with random weights, of each kind."""

from collections.abc import Callable

import pytest
from reference.random_weights import randomize

SIZES = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24}
# Causal or not and pre- or post-norm are independent of each other: two kinds show all four, the others are slow.
KINDS = [
    pytest.param({"causal": True}, id="causal-pre"),
    pytest.param({"causal": False, "norm": "post"}, id="encoder-post"),
    pytest.param({"causal": True, "norm": "post"}, id="causal-post", marks=pytest.mark.slow),
    pytest.param({"causal": False}, id="encoder-pre", marks=pytest.mark.slow),
]
# The Llama family, with the biases of Qwen2, so that a method on biases finds some.
LLAMA = {
    "position": "rotary",
    "norm_type": "rms",
    "gated": True,
    "activation": "silu",
    "n_kv_heads": 1,
    "bias": "query+key+value",
}
KINDS_AND_LLAMA = [*KINDS, pytest.param(LLAMA, id="llama")]


def tiny_of(kind: dict) -> Callable:
    """What makes a tiny model of that kind: `build(seed, activation="relu", ...)`."""
    from minitransformer import Transformer, TransformerConfig  # not before their shapes are checked

    def build(seed: int = 0, **changes) -> Transformer:
        return randomize(Transformer(TransformerConfig(**(SIZES | kind | changes)), seed))

    return build

"""Tiny models with random weights, of each kind."""

from collections.abc import Callable

import pytest
from reference.kinds import kinds
from reference.random_weights import randomize

SIZES = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24}
# The Llama family, with the biases of Qwen2, so that a method on biases finds some.
LLAMA = {
    "position": "rotary",
    "norm_type": "rms",
    "gated": True,
    "activation": "silu",
    "n_kv_heads": 1,
    "bias": "query+key+value",
}
KINDS_AND_LLAMA = [*kinds("causal-pre", "encoder-post"), pytest.param(LLAMA, id="llama")]


def tiny_of(kind: dict) -> Callable:
    """What makes a tiny model of that kind: `build(seed, activation="relu", ...)`."""
    from minitransformer import Transformer, TransformerConfig  # not before their shapes are checked

    def build(seed: int = 0, **changes) -> Transformer:
        return randomize(Transformer(TransformerConfig(**(SIZES | kind | changes)), seed))

    return build

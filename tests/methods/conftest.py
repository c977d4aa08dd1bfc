"""One model for tests that need no more than that."""

import pytest


@pytest.fixture
def decoder():
    """A small causal pre-norm model with random weights."""
    from minitransformer import Transformer, TransformerConfig

    def build(seed: int = 0, **changes):
        sizes = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24}
        return Transformer(TransformerConfig(**(sizes | changes)), seed).eval()

    return build

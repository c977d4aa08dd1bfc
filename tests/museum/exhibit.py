"""What the exhibits share: a small model, a padded batch, a loss."""

import pytest
import torch

from minitransformer import Transformer, TransformerConfig


def small_model(seed=0, **changes):
    """A decoder with two layers and random weights."""
    sizes = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24}
    return Transformer(TransformerConfig(**(sizes | changes)), seed)


def batch():
    """Tokens [3, 6], padded on the right in the last two rows, and the mask."""
    tokens = torch.randint(23, (3, 6), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(6) < torch.tensor([[6], [5], [4]])


def loss_of(model):
    """A scalar that every real position has a part in."""
    tokens, mask = batch()
    logits = model(tokens, mask)[mask]
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).mean() + logits.logsumexp(-1).mean()


def caught(check, *wrong):
    """The check fails on the wrong way: with an AssertionError, which a test would show, and not by accident."""
    with pytest.raises(AssertionError):
        check(*wrong)

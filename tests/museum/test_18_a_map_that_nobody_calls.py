"""LoRA round a linear layer whose owner reads the weight and never calls the layer.

`nn.MultiheadAttention` hands `out_proj.weight` to a function; `out_proj` itself is never called. A wrapper round it
that computes something in `forward` is a wrapper round nothing: it trains without a gradient, and changes no output.

Found in: Baijiong-Lin/LoRA-Torch, issue 3 (https://github.com/Baijiong-Lin/LoRA-Torch/issues/3)

The lesson: a target that cannot have an effect is refused when it is attached, by name.
"""

import pytest
import torch
from exhibit import caught
from torch import nn

import peft


class Wrapped(nn.Linear):
    """The wrong way: a subclass, so that its owner still finds a `weight`, with a `forward` that nobody calls."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.update = nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x):
        return super().forward(x) + x @ self.update.T


def by_subclass(attention):
    attention.out_proj = Wrapped(attention.out_proj)
    return [attention.out_proj.update]


def ours(attention):
    return list(peft.trainable_parameters(peft.attach(attention, peft.LoRA(targets=("out_proj",), rank=2))).values())


def check_what_is_attached_gets_a_gradient_or_is_refused(attach):
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.ones(1, 3, 8)
    try:
        trained = attach(attention)
    except ValueError as refusal:
        assert "out_proj" in str(refusal)
        return
    attention(x, x, x)[0].sum().backward()
    assert all(tensor.grad is not None for tensor in trained), "attached, and without any effect"


def test_the_output_projection():
    caught(check_what_is_attached_gets_a_gradient_or_is_refused, by_subclass)
    check_what_is_attached_gets_a_gradient_or_is_refused(ours)


def test_the_refusal_changes_nothing():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    modules = dict(attention.named_modules())
    with pytest.raises(ValueError, match="out_proj"):
        ours(attention)
    assert dict(attention.named_modules()) == modules and all(p.requires_grad for p in attention.parameters())

"""Gradient checkpointing that gives no gradient.

Checkpointing forgets a block's activations and computes them again in the backward pass. PyTorch's older,
*reentrant* form looks only at whether the block's *inputs* need a gradient. With a frozen embedding the first
block's input needs none, so what is trained inside of it gets none: silently (with a warning that is easily lost),
as long as a later block is not checkpointed and learns.

The lesson: look at the gradient of every tensor *in every layer*, with checkpointing switched on. Ours uses the form
that is not reentrant.
"""

import warnings

import torch
from exhibit import batch, caught, loss_of, small_model
from torch.utils.checkpoint import checkpoint

import peft


class Reentrant(torch.nn.Module):
    """The wrong way: one argument of one call."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *rest):
        return checkpoint(self.block, x, *rest, use_reentrant=True)


def wrong():
    model = peft.attach(small_model(), peft.LoRA(rank=2)).train()
    model.blocks[0] = Reentrant(model.blocks[0])  # every second block, to save half of the memory
    return model


def ours():
    return peft.attach(small_model(gradient_checkpointing=True), peft.LoRA(rank=2)).train()


def check_every_layer_gets_a_gradient(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_of(model).backward()
    for layer in (0, 1):
        grads = [p.grad for name, p in model.named_parameters() if f"blocks.{layer}." in name and name.endswith(".B")]
        assert len(grads) == 2 and all(g is not None and g.norm() > 0 for g in grads), f"layer {layer} gets none"


def test_the_first_layer_learns():
    caught(check_every_layer_gets_a_gradient, wrong())
    check_every_layer_gets_a_gradient(ours())


def test_checkpointing_changes_no_output():
    tokens, mask = batch()
    plain = peft.attach(small_model(), peft.LoRA(rank=2)).train()
    assert torch.equal(ours()(tokens, mask), plain(tokens, mask))

"""A block that is computed again for its gradient, after the method has been switched.

Preference optimisation asks the frozen model (the method switched off) and the tuned one in turn, and calls `backward`
at the end. With gradient checkpointing a block is computed again in the backward pass, when the switch stands
elsewhere: the gradient is then that of another model. Nothing is raised where both ways keep tensors of the same shapes
(a shifted bias keeps none).

Found in: huggingface/peft, issue 2832 (https://github.com/huggingface/peft/issues/2832)

The lesson: a recomputation must see what the forward pass saw. Ours carries it along (`minitransformer/call.py`).
"""

import torch
from exhibit import batch, caught, small_model
from torch.utils.checkpoint import checkpoint

import peft


class Recomputed(torch.nn.Module):
    """The wrong way: a block is called again as the model happens to be by then."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *rest):
        return checkpoint(self.block, x, *rest, use_reentrant=False)


def with_biases(**changes):
    model = peft.attach(small_model(**changes), peft.BitFit())
    with torch.no_grad():
        for number, tensor in enumerate(peft.trainable_parameters(model).values()):
            tensor.normal_(generator=torch.Generator().manual_seed(number))
    return model


def wrong():
    model = with_biases()
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = Recomputed(block)
    return model


def ours():
    return with_biases(gradient_checkpointing=True)


def check_the_gradient_is_the_frozen_models(model):
    def gradient(around):
        weight = model.embedding.token.weight.requires_grad_(True)
        with around:
            loss = model(batch()[0]).square().mean()
        return torch.autograd.grad(loss, weight)[0]  # outside of `around`, as in a training loop

    frozen = small_model()
    weight = frozen.embedding.token.weight
    expected = torch.autograd.grad(frozen(batch()[0]).square().mean(), weight)[0]
    assert torch.equal(gradient(peft.disabled(model)), expected), "the backward pass went through the method"


def test_switched_off_in_the_forward_pass_only():
    caught(check_the_gradient_is_the_frozen_models, wrong())
    check_the_gradient_is_the_frozen_models(ours())

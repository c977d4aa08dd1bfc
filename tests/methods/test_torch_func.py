"""`torch.func` over every recipe: gradients of single texts at once, and derivatives in one direction."""

import pytest
import torch
from reference.method_cases import RECIPES, batch, each_of, train_a_little
from reference.random_weights import randomize
from torch.func import functional_call, grad, jvp, vmap

import peft
from minitransformer import Transformer, TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # says PyTorch of its kernel
every_recipe = each_of("recipe", RECIPES)


def trained(recipe, attention):
    model = randomize(Transformer(TransformerConfig(23, 12, 16, 2, 2, 24, attention=attention))).double()
    train_a_little(peft.attach(model, recipe))
    return model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_of_one(model):
    return lambda tensors, row, real: functional_call(model, tensors, (row[None], real[None]))[0, 0].logsumexp(-1)


@every_recipe
def test_gradients_of_single_texts_are_those_of_one_backward_pass_each(recipe):
    model, tensors = trained(recipe, "fused")
    tokens, mask = batch()
    together = vmap(grad(loss_of_one(model)), in_dims=(None, 0, 0))(tensors, tokens, mask)
    for row in range(len(tokens)):
        model.zero_grad()
        model(tokens[row : row + 1], mask[row : row + 1])[0, 0].logsumexp(-1).backward()
        for name, p in model.named_parameters():
            if name in tensors:
                torch.testing.assert_close(together[name][row], p.grad, rtol=1e-9, atol=1e-12)


@every_recipe
def test_the_derivative_in_a_direction_is_the_gradients_share_of_it(recipe):
    model, tensors = trained(recipe, "written_out")  # PyTorch's fused kernel has no forward mode
    tokens, mask = batch()
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in tensors.items()}

    def loss(tensors):
        return functional_call(model, tensors, (tokens, mask))[mask].logsumexp(-1).mean()

    _, forward = jvp(loss, (tensors,), (direction,))
    backward = sum((g * direction[name]).sum() for name, g in grad(loss)(tensors).items())
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-12)
    assert forward.abs() > 1e-6

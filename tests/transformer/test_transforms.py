"""The plain model under torch.func: gradients of each row alone, directional derivatives, second derivatives."""

import pytest
import torch
from reference.random_weights import randomize
from reference.tiny_models import LLAMA

from minitransformer import SequenceClassifier, Transformer, TransformerConfig
from minitransformer.fast import loss as fast_loss

CONFIG = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "n_segments": 2}
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
REAL = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
TARGETS = TOKENS.roll(-1, dims=1).masked_fill(~REAL, -100)
SEGMENTS = (TOKENS > 4).long()


KINDS = [{}, {"attention": "written_out"}, {"gradient_checkpointing": True}, {"causal": False}, LLAMA]


@pytest.fixture(params=KINDS, ids=["plain", "written out", "checkpointed", "encoder", "llama"])
def model(request, monkeypatch):
    monkeypatch.setattr(fast_loss, "WORTH_IT", 1)
    return randomize(Transformer(TransformerConfig(**CONFIG, **request.param))).double()


class Loss(torch.nn.Module):
    """Each way of asking a model, of a batch."""

    def __init__(self, model, how):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, tokens, real, targets, segments):
        if self.how == "logits":
            return self.model(tokens, real, segments).square().mean()
        if self.how == "loss":
            return self.model.loss(tokens, targets, real)
        if self.how == "asked":
            return self.model.hidden(tokens, real, asked=real.sum(dim=1) - 1).square().sum()
        return self.model(tokens, real).square().sum()  # a classifier


def asked_of(model, how):
    module = Loss(SequenceClassifier(model, 3).double() if how == "classifier" else model, how)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights, *row):
        return torch.func.functional_call(module, weights, tuple(part[None] for part in row))

    return module, weights, loss


@pytest.mark.parametrize("how", ["logits", "loss", "asked", "classifier"])
def test_gradients_of_each_row_are_those_that_it_has_alone(model, how):
    module, weights, loss = asked_of(model, how)
    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))(weights, TOKENS, REAL, TARGETS, SEGMENTS)
    for row in range(3):
        parts = [part[row : row + 1] for part in (TOKENS, REAL, TARGETS, SEGMENTS)]
        alone = torch.autograd.grad(module(*parts), list(module.parameters()), allow_unused=True)
        for name, gradient in zip(weights, alone, strict=True):
            expected = torch.zeros_like(weights[name]) if gradient is None else gradient
            torch.testing.assert_close(together[name][row], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("how", ["logits", "loss", "asked", "classifier"])
def test_a_directional_derivative_is_the_gradient_in_that_direction(model, how):
    module, weights, _ = asked_of(model, how)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in weights.items()}
    parts = (TOKENS, REAL, TARGETS, SEGMENTS)
    _, got = torch.func.jvp(lambda own: torch.func.functional_call(module, own, parts), (weights,), (direction,))
    gradients = torch.autograd.grad(module(*parts), list(module.parameters()), allow_unused=True)
    pairs = zip(gradients, direction.values(), strict=True)
    torch.testing.assert_close(got, sum((g * d).sum() for g, d in pairs if g is not None), rtol=1e-9, atol=1e-11)


def test_second_derivatives_are_symmetric(model):
    _, weights, loss = asked_of(model, "loss")
    row = [part[0] for part in (TOKENS, REAL, TARGETS, SEGMENTS)]
    name = "model.blocks.1.attention.key.weight"
    n = weights[name].numel()
    hessian = torch.func.hessian(lambda own: loss(weights | {name: own}, *row))(weights[name]).view(n, n)
    assert hessian.abs().max() > 0
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-7, atol=1e-9)

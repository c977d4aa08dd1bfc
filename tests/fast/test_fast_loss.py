"""The next-word loss's fast form against the plain one and NumPy, value and gradient; and where it must not be used."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.random_weights import randomize
from torch import nn

from minitransformer import Transformer, TransformerConfig
from minitransformer.fast import loss as fast_loss
from minitransformer.fast.loss import fast_cross_entropy, pays
from minitransformer.heads import LMHead
from minitransformer.tasks import Dataset
from minitransformer.training.objectives import next_token_loss

N, V, D, SCALE = 11, 7, 5, 0.6


@pytest.fixture(params=[(1, 1), (3, 2), (4, V), (N, 3), (100, 100)], ids=str)
def tiled(request, monkeypatch):
    """Tiles of one and of some of the 11 rows and 7 words, the last ones full or not; and all at once."""
    for name, size in zip(("ROWS", "WORDS"), request.param, strict=True):
        monkeypatch.setattr(fast_loss, name, size)


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(N, D, generator=generator, dtype=dtype)
    embedding = torch.randn(V, D, generator=generator, dtype=dtype)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.requires_grad_(), embedding.requires_grad_(), targets


def plain(hidden, embedding, targets):
    return F.cross_entropy(SCALE * F.linear(hidden, embedding), targets)


@pytest.mark.usefixtures("tiled")
def test_it_equals_the_plain_form_in_value_gradient_and_right_answers():
    hidden, embedding, targets = tensors()
    loss, correct = fast_cross_entropy(hidden, embedding, targets, SCALE)
    expected = plain(hidden, embedding, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    got = torch.autograd.grad(3 * loss, (hidden, embedding))  # what comes from above is a factor
    for gradient, other in zip(got, torch.autograd.grad(3 * expected, (hidden, embedding)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-13)
    assert 0 < correct == (F.linear(hidden, embedding).argmax(dim=-1) == targets).sum() < N


@pytest.mark.usefixtures("tiled")
def test_it_equals_its_equations_in_numpy():
    hidden, embedding, targets = tensors()
    loss, _ = fast_cross_entropy(hidden, embedding, targets, SCALE)
    gradients = torch.autograd.grad(loss, (hidden, embedding))
    h, E, t = hidden.detach().numpy(), embedding.detach().numpy(), targets.numpy()
    z = SCALE * h @ E.T
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss.item(), -np.log(p[np.arange(N), t]).mean(), rtol=1e-12)
    dz = (p - np.eye(V)[t]) / N
    for got, expected in zip(gradients, (SCALE * dz @ E, SCALE * dz.T @ h), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-13)


def test_first_derivatives_by_finite_differences():
    hidden, embedding, targets = tensors()
    assert torch.autograd.gradcheck(lambda h, E: fast_cross_entropy(h, E, targets, SCALE)[0], (hidden, embedding))


def test_a_second_derivative_is_refused_and_not_wrong():
    hidden, embedding, targets = tensors()
    loss, _ = fast_cross_entropy(hidden, embedding, targets, 1.0)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice; take the plain one, .*cross_entropy"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("learning", [(), (0,), (1,)])
def test_only_what_asks_for_a_gradient_gets_one(learning):
    *given, targets = tensors()
    given = [tensor.detach().requires_grad_(i in learning) for i, tensor in enumerate(given)]
    loss, _ = fast_cross_entropy(*given, targets, 1.0)
    assert loss.requires_grad == bool(learning)
    if learning:
        loss.backward()
    assert [i for i, tensor in enumerate(given) if tensor.grad is not None] == list(learning)


def test_without_autograd_no_gradient_is_made(monkeypatch):
    hidden, embedding, targets = tensors()
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Sizes():
        loss, _ = fast_cross_entropy(hidden, embedding, targets, SCALE)
    assert made.count(torch.ops.aten.mm.out) == 1 and torch.ops.aten.addmm_.default not in made
    torch.testing.assert_close(loss, plain(hidden, embedding, targets).detach())


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_words_that_are_all_but_impossible_have_their_finite_loss(size):
    """Where softmax rounds to 0, its logarithm would be minus infinity: the loss is the distance to the best word."""
    hidden, embedding = torch.tensor([[size, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss, correct = fast_cross_entropy(hidden, embedding, torch.tensor([1]), 1.0)
    expected = F.cross_entropy(hidden.detach() @ embedding.T, torch.tensor([1]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and correct == 0
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


@pytest.mark.usefixtures("tiled")
def test_the_loss_of_a_sure_and_right_word_keeps_its_digits():
    """The loss is a small difference of large numbers: the large ones must meet first."""
    for size in (1e2, 1e4):
        hidden, embedding = torch.tensor([[1.0]]), torch.tensor([[size], [size - 5]])
        loss, correct = fast_cross_entropy(hidden, embedding, torch.tensor([0]), 1.0)
        assert loss.item() == pytest.approx(np.log1p(np.exp(-5)), rel=1e-4) and correct == 1


@pytest.mark.usefixtures("tiled")
def test_of_equally_high_words_the_first_counts_as_the_answer():
    hidden, embedding = torch.zeros(3, D), torch.randn(V, D)
    assert fast_cross_entropy(hidden, embedding, torch.tensor([0, 1, 6]), 1.0)[1] == 1


def test_a_nan_in_the_hidden_states_is_a_nan_in_the_loss():
    hidden, embedding, targets = tensors(torch.float32)
    broken = hidden.detach().masked_fill(torch.arange(D) == 1, torch.nan)
    assert fast_cross_entropy(broken, embedding, targets, 1.0)[0].isnan()


def test_it_pays_where_there_are_many_logits_in_full_precision():
    many, few = torch.zeros(fast_loss.WORTH_IT // 8, 2), torch.zeros(fast_loss.WORTH_IT // 8 - 1, 2)
    table = nn.Embedding(8, 2)
    assert pays(many, table) and not pays(few, table)
    assert not pays(many.double(), table) and not pays(many.bfloat16(), table.bfloat16())


def model_and_batch(**changes):
    config = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24} | changes
    tokens = torch.randint(23, (4, 9), generator=torch.Generator().manual_seed(0))
    real = torch.arange(9) < torch.tensor([[9], [4], [7], [1]])
    return randomize(Transformer(TransformerConfig(**config))).double(), Dataset(tokens, real, tokens[:, 0])


def scored(model, batch):
    score = next_token_loss(model, batch)
    model.zero_grad()
    score.loss.backward()
    return score, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("changes", [{}, {"logit_scale": 0.25}, {"norm": "post"}], ids=str)
def test_a_model_learns_the_same_by_either_form(monkeypatch, changes):
    model, batch = model_and_batch(**changes)
    plainly, expected = scored(model, batch)
    monkeypatch.setattr(fast_loss, "WORTH_IT", 1)
    called = []
    place = "minitransformer.transformer.fast_cross_entropy"
    monkeypatch.setattr(place, lambda *a: called.append(1) or real(*a))
    real = fast_loss.fast_cross_entropy
    quickly, got = scored(model, batch)
    assert called == [1]
    assert (quickly.correct, quickly.count) == (plainly.correct, plainly.count)
    for one, other in zip([quickly.loss, *got], [plainly.loss, *expected], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


class HalfAsSure(Transformer):
    def lm_head(self, hidden):
        return super().lm_head(hidden) / 2


@pytest.mark.parametrize("how", ["a subclass", "a hook on the head", "a hook on everything"])
def test_a_head_that_somebody_changed_takes_the_plain_form(monkeypatch, how):
    monkeypatch.setattr(fast_loss, "WORTH_IT", 1)
    model, batch = model_and_batch()
    expected = F.cross_entropy(model(batch.tokens)[:, 0] / 2, batch.targets)
    handle = None
    if how == "a subclass":
        model.__class__ = HalfAsSure
    elif how == "a hook on the head":
        handle = model.head.register_forward_hook(lambda *arguments: arguments[-1] / 2)
    else:
        hook = lambda module, _, out: out / 2 if type(module) is LMHead else None  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        loss = model.word_loss(model.hidden(batch.tokens)[:, 0], batch.targets)[0]
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(loss, expected)


def test_another_head_takes_the_plain_form(monkeypatch):
    monkeypatch.setattr(fast_loss, "WORTH_IT", 1)
    model, batch = model_and_batch(lm_head="bert", causal=False)
    hidden = model.hidden(batch.tokens)[:, 0]
    torch.testing.assert_close(
        model.word_loss(hidden, batch.targets)[0], F.cross_entropy(model.lm_head(hidden), batch.targets)
    )

"""Late to the optimizer.

An optimizer is made, then a second method is attached: its tensors require a gradient, and get one, and never move,
since the optimizer does not hold them. The loss still falls, thanks to the first method. Or an optimizer still holds
the tensors of a method that was detached, and moves those.

The lesson: whoever trains compares what requires a gradient with what the optimizer holds. `fit` does, before step
one."""

import pytest
import torch
from exhibit import batch, caught, loss_of, small_model

import peft
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import fit, next_token_loss


def plain_loop(model, optimizer):
    """The wrong way: a loop that trusts its optimizer."""
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def ours(model, optimizer):
    tokens, mask = batch()
    data = Dataset(tokens, mask, torch.zeros(3, dtype=torch.int64))
    fit(model, data, steps=3, optimizer=optimizer, objective=next_token_loss, progress=False, warmup=0)


def model_and_optimizer():
    model = peft.attach(small_model(), peft.PrefixTuning(length=2))
    optimizer = torch.optim.SGD(peft.trainable_parameters(model).values(), lr=0.1)
    return peft.attach(model, peft.BottleneckAdapter(bottleneck=2, placement="parallel")), optimizer


def check_everything_that_should_learn_moves_or_it_is_said(loop):
    model, optimizer = model_and_optimizer()
    before = peft.state_dict(model)
    try:
        loop(model, optimizer)
    except ValueError as error:
        assert "make the optimizer after the last attach()" in str(error)
        return
    for name in peft.trainable_parameters(model):
        assert not torch.equal(peft.state_dict(model)[name], before[name]), f"{name} never moved"


def test_a_second_method_after_the_optimizer():
    caught(check_everything_that_should_learn_moves_or_it_is_said, plain_loop)
    check_everything_that_should_learn_moves_or_it_is_said(ours)


def test_an_optimizer_from_before_detach_and_attach():
    model, optimizer = model_and_optimizer()
    peft.attach(peft.detach(model), peft.PrefixTuning(length=2))
    with pytest.raises(ValueError, match="does not hold 4 trainable tensors"):
        ours(model, optimizer)

"""LoRA on the fresh classification head.

"Replace every linear layer by one with LoRA" also finds the new head, whose weights are random: the head itself is
then frozen in its random state, with a low-rank correction beside it. Twelve thousand trained parameters instead of the
one and a half thousand of a plain head: 768 * 2 + 2 = 1,538.

Found in: rasbt, LLMs-from-scratch, appendix E

The lesson: a fresh head is trained whole, beside the method, and is named (`train_also`); targets are named too.
"""

import torch
from exhibit import caught, small_model
from torch import nn

import peft
from minitransformer.heads import SequenceClassifier


def classifier():
    return SequenceClassifier(small_model(lm_head="none"), n_classes=2, seed=3)


def every_linear(model):
    """The wrong way: targets are whatever is linear."""
    names = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return peft.attach(model, peft.LoRA(rank=2, targets=names))


def ours(model):
    return peft.attach(model, peft.LoRA(rank=2, targets=peft.ALL_LINEARS), train_also=("head",))


def check_the_head_is_trained_whole(prepare):
    model = prepare(classifier())
    head = [name for name in peft.trainable_parameters(model) if name.startswith("head.")]
    assert sorted(head) == ["head.bias", "head.weight"], f"of the head, {head} is trained"


def test_the_head():
    caught(check_the_head_is_trained_whole, every_linear)
    check_the_head_is_trained_whole(ours)


def test_the_head_learns_and_the_count_is_that_of_a_plain_head():
    model, config = ours(classifier()), small_model().config
    trained = peft.parameter_table(model).trained
    recipe = peft.LoRA(rank=2, targets=peft.ALL_LINEARS)
    assert trained == peft.expected_parameters(config, recipe) + config.d_model * 2 + 2
    before = model.head.weight.detach().clone()
    torch.nn.functional.cross_entropy(model(torch.tensor([[1, 2]])), torch.tensor([1])).backward()
    torch.optim.SGD(peft.trainable_parameters(model).values(), lr=1.0).step()
    assert not torch.equal(model.head.weight, before)

"""What the tests of many tasks share: the methods of some tasks, models that have them alone, and a batch."""

import copy

import torch
from reference.method_cases import RECIPES, train_a_little

import peft
from peft import BottleneckAdapter, PrefixTuning, TaskBank

TASKS = {
    "lora": (RECIPES["lora"],),
    "lora all": (RECIPES["lora all"],),
    "lora layer 1": (RECIPES["lora layer 1"],),
    "prefix": (PrefixTuning(length=3),),
    "longer prefix": (PrefixTuning(length=5, layers=(0,)),),
    "hidden prefix": (PrefixTuning(length=2, at="hidden"),),
    "houlsby": (RECIPES["houlsby"],),
    "narrow houlsby": (BottleneckAdapter(bottleneck=2, scale=2.0),),
    "pfeiffer": (RECIPES["pfeiffer"],),
    "parallel": (RECIPES["parallel"],),
    "inside_ffn": (RECIPES["inside_ffn"],),
    "mam": (PrefixTuning(length=4), RECIPES["parallel"]),
    "lora + houlsby": (RECIPES["lora all"], RECIPES["houlsby"]),
}


def alone(model, seed, recipes):
    """A copy of the model with the methods attached and trained a little."""
    twin = copy.deepcopy(model)
    for recipe in recipes:
        peft.attach(twin, recipe, seed=seed)
    return train_a_little(twin, seed)


def everything(model):
    return {name: alone(model, seed, recipes) for seed, (name, recipes) in enumerate(TASKS.items())}


def rows_of(n, length=6, side="right"):
    tokens = torch.randint(23, (n, length), generator=torch.Generator().manual_seed(4))
    real = torch.arange(length) < torch.tensor([[length - row % 3] for row in range(n)])
    return tokens, real if side == "right" else real.flip(1)


def loss_of_rows(logits, real):
    """A sum over the real positions, so that each row has its own gradient whatever else is in the batch."""
    return (logits[real] * torch.linspace(-1, 1, logits.shape[-1])).pow(2).sum()


def gradients(bank: TaskBank, task: str):
    """The gradients of one task's tensors by name, each with that of what fills it up."""
    found = {}
    for site, mixed in bank.mixed:
        for name, shape in mixed.shapes.get(task, {}).items():
            gradient = mixed.tensors()[name].grad
            if gradient is None:
                continue
            gradient = gradient[list(mixed.shapes).index(task)].clone()
            inside = tuple(map(slice, shape))
            own = gradient[inside].clone()
            gradient[inside] = 0
            found[f"{site}.{name}"] = own, gradient
    return found


def assert_gradients_equal(bank: TaskBank, task: str, single: torch.nn.Module, atol=1e-10, rtol=1e-9):
    """The task's gradients are those of a model that has its methods alone; what fills tensors up must not learn."""
    mine, theirs = gradients(bank, task), peft.trainable_parameters(single)
    assert mine.keys() == theirs.keys(), task
    for name, (own, filling) in mine.items():
        expected = torch.zeros_like(own) if theirs[name].grad is None else theirs[name].grad
        torch.testing.assert_close(own, expected, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{task} {n}: {m}")
        assert not filling.any(), (task, name)

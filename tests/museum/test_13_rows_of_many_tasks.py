"""Rows of one batch under different adapters, and a name that nobody knows.

A server has a batch whose rows belong to different tasks. A misspelt name finds no adapter; if that means "no update"
instead of an error, the row comes out as the base model's, fluent and wrong. And if the rows of each task are run one
after the other, every further task costs a pass of its own.

Found in: https://github.com/huggingface/peft/pull/2090 (unknown names), https://github.com/huggingface/peft/issues/2283
(one adapter after the other)

The lesson: a name is looked up before anything is computed, and rows are served by products over stacked tensors.
"""

import copy

import pytest
import torch
from exhibit import batch, caught, small_model

import peft


def adapters():
    made = {}
    for seed, name in enumerate(("formal", "terse")):
        model = peft.attach(small_model(), peft.LoRA(rank=2), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in peft.trainable_parameters(model).values():
                p.copy_(torch.randn(p.shape, generator=generator))
        made[name] = model
    return made


class OneAfterTheOther:
    """The wrong way: a pass for each adapter, its rows picked out; whoever is unknown gets the base model."""

    def __init__(self, model, models):
        self.base, self.models, self.passes = model, models, 0

    def __call__(self, tokens, mask, *, tasks):
        self.passes += 1
        out = self.base(tokens, mask)
        for name, model in self.models.items():
            rows = torch.tensor([row for row, task in enumerate(tasks) if task == name], dtype=torch.long)
            self.passes += 1
            out[rows] = model(tokens[rows], mask[rows])
        return out


class Counted(peft.TaskBank):
    """Ours, with its passes counted."""

    passes = 0

    def __call__(self, *rest, **options):
        self.passes += 1
        return super().__call__(*rest, **options)


def check_an_unknown_name_is_an_error(kind):
    tokens, mask = batch()
    serve = kind(small_model(), adapters())
    try:
        with torch.no_grad():
            serve(tokens, mask, tasks=["formal", "tesre", None])
    except ValueError as error:
        assert "tesre" in str(error) and "terse" in str(error)
    else:
        raise AssertionError("a misspelt name went through as the base model")


def check_a_batch_is_one_pass(kind):
    tokens, mask = batch()
    models = adapters()
    serve = kind(copy.deepcopy(small_model()), models)
    with torch.no_grad():
        out = serve(tokens, mask, tasks=["terse", "formal", None])
        alone = models["terse"](tokens, mask)
    torch.testing.assert_close(out[0][mask[0]], alone[0][mask[0]], atol=1e-5, rtol=0)
    assert serve.passes == 1, f"{serve.passes} passes for one batch"


@pytest.mark.parametrize("check", [check_an_unknown_name_is_an_error, check_a_batch_is_one_pass])
def test_rows_of_many_tasks(check):
    caught(check, OneAfterTheOther)
    check(Counted)

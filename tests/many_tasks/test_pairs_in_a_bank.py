"""Every pair of recipes that a bank accepts, attached in both orders, as one task among all the others."""

import copy
import itertools

import pytest
import torch
from reference.bank_cases import alone, assert_gradients_equal, loss_of_rows, rows_of
from reference.kinds import of_kind
from reference.method_cases import RECIPES

import peft
from peft import BottleneckAdapter, LoRA, PrefixTuning, TaskBank

FAMILIES = {
    "lora all": RECIPES["lora all"],
    "lora key, value": LoRA(rank=1, alpha=2.0, targets=("key", "value")),
    "lora query": LoRA(rank=4, rank_stabilized=True, targets=("query",)),
    "prefix kv": RECIPES["prefix kv"],
    "prefix hidden": PrefixTuning(length=2, at="hidden"),
    "houlsby": RECIPES["houlsby"],
    "parallel": RECIPES["parallel"],
    "inside_ffn": RECIPES["inside_ffn"],
}
MORE = {name: RECIPES[name] for name in (
    "lora", "lora A", "lora B", "lora layer 1", "prefix hidden normal", "prefix layer 1", "pfeiffer", "houlsby layer 0",
)}  # fmt: skip
SOME = pytest.param(FAMILIES, id="families")
ALL = pytest.param(FAMILIES | MORE, id="all", marks=pytest.mark.slow)


def pairs(model, recipes):
    """A model for every ordered pair that one model can carry, and for each recipe by itself."""
    models = {}
    for seed, names in enumerate([*itertools.permutations(recipes, 2), *((name,) for name in recipes)]):
        try:
            models[" + ".join(names)] = alone(model, seed, [recipes[name] for name in names])
        except ValueError as error:  # the two share a place, which no model carries either
            assert "cannot stand beside it" in str(error) or "came first" in str(error)
    return models


def single_rows(models, order, name):
    return torch.tensor([row for row, task in enumerate(order) if task == name])


@of_kind("causal-pre")
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("recipes", [SOME, ALL])
def test_a_pair_is_what_it_is_alone_in_value_and_gradient(tiny, recipes, checkpointing):
    model = tiny().double()
    models = pairs(model, recipes)
    bank = TaskBank(tiny(gradient_checkpointing=checkpointing).double(), models, trainable=True)
    order = [*models, None]
    tokens, real = rows_of(len(order))
    logits = bank(tokens, real, tasks=order)
    with bank.using([None] * len(order)):
        loss_of_rows(logits, real).backward()
    for row, (name, single) in enumerate(models.items()):
        own = slice(row, row + 1)
        expected = single(tokens[own], real[own])
        torch.testing.assert_close(logits[own][real[own]], expected[real[own]], atol=1e-11, rtol=0, msg=name)
        loss_of_rows(expected, real[own]).backward()
        assert_gradients_equal(bank, name, single)
    expected = model(tokens[-1:], real[-1:])
    torch.testing.assert_close(logits[-1:][real[-1:]], expected[real[-1:]], atol=1e-11, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("recipes", [SOME, ALL])
def test_a_pair_generates_what_it_generates_alone(decoder, recipes):
    model = decoder(max_len=20).double()
    models = pairs(model, recipes)
    bank, order = TaskBank(copy.deepcopy(model), models), [*models, None]
    tokens, real = rows_of(len(order), side="left")
    words = bank.generate(tokens, 6, padding_mask=real, tasks=order)
    for row, name in enumerate(order):
        single, own = models.get(name, model), slice(row, row + 1)
        assert torch.equal(words[own], single.generate(tokens[own], 6, padding_mask=real[own])), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_a_pair_is_what_it_is_alone_but_for_rounding(decoder, dtype):
    exact = decoder().double()
    half = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(half).double()
    models = pairs(half, FAMILIES)
    bank, order = TaskBank(half, models), [*models, None]
    tokens, real = rows_of(len(order))
    with torch.no_grad():
        logits = bank(tokens, real, tasks=order)
        assert logits.dtype == dtype
        for row, name in enumerate(order):
            single = exact if name is None else copy.deepcopy(models[name]).double()
            own = slice(row, row + 1)
            error = (logits[own] - single(tokens[own], real[own]))[real[own]].abs().max()
            assert error < 40 * torch.finfo(dtype).eps * logits[own].abs().max(), (name, error)


@pytest.mark.slow
def test_one_position_of_each_row(tiny):
    """`answer_loss` asks the last block for one position: `hidden(..., asked=)`."""
    model = tiny().double()
    models = pairs(model, FAMILIES)
    bank, order = TaskBank(copy.deepcopy(model), models), [*models, None]
    tokens, real = rows_of(len(order))
    asked = real.sum(dim=1) - 1
    with bank.using(order):
        hidden = bank.model.hidden(tokens, real, asked=asked)
    for row, name in enumerate(order):
        expected = models.get(name, model).hidden(tokens[row : row + 1], real[row : row + 1])[0, asked[row]]
        torch.testing.assert_close(hidden[row, 0], expected, atol=1e-11, rtol=0, msg=name)


def test_dropout_falls_on_a_hidden_prefix_too(decoder):
    """It passes by W_k and W_v with their LoRA, so with its dropout, row by row."""
    recipes = PrefixTuning(length=2, at="hidden"), LoRA(rank=2, targets=("key", "value"), dropout=0.5)
    model = decoder()
    bank = TaskBank(copy.deepcopy(model), {"wet": alone(model, 1, recipes), "dry": alone(model, 1, recipes[:1])})
    bank.train()
    tokens = rows_of(1)[0].expand(3, -1)
    first, second = (bank(tokens, tasks=["wet", "dry", None]) for _ in range(2))
    assert torch.equal(first[1:], second[1:]) and not torch.allclose(first[0], second[0])


def test_a_factor_that_a_recipe_keeps_fixed_is_not_trained(decoder):
    model = decoder()
    recipes = {"both": LoRA(rank=2), "B": LoRA(rank=2, train=("B",)), "A": LoRA(rank=3, train=("A",))}
    models = {name: alone(model, seed, [recipe]) for seed, (name, recipe) in enumerate(recipes.items())}
    bank, (tokens, real) = TaskBank(model, models, trainable=True), rows_of(3)
    optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    loss_of_rows(bank(tokens, real, tasks=list(recipes)), real).backward()
    optimizer.step()
    for name, single in models.items():
        start, now = peft.state_dict(single), bank.tensors(name)
        for tensor, values in start.items():
            assert torch.equal(values, now[tensor]) == (tensor[-1] not in recipes[name].train), (name, tensor)


@pytest.mark.parametrize("recipe", FAMILIES.values(), ids=FAMILIES)
def test_a_task_that_diverged_reaches_no_other_row(decoder, recipe):
    model = decoder()
    models = {"sound": alone(model, 1, [LoRA(rank=2)]), "broken": alone(model, 2, [recipe])}
    bank, (tokens, real) = TaskBank(copy.deepcopy(model), models, trainable=True), rows_of(3)
    with torch.no_grad():
        for _, mixed in bank.mixed:
            if "broken" in mixed.shapes:
                for tensor in mixed.tensors().values():
                    tensor[list(mixed.shapes).index("broken")] = torch.nan
    logits = bank(tokens, real, tasks=["sound", "broken", None])
    loss_of_rows(logits[[0, 2]], real[[0, 2]]).backward()
    assert logits[1].isnan().any()
    torch.testing.assert_close(logits[:1], models["sound"](tokens[:1], real[:1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[2:], model(tokens[2:], real[2:]), atol=1e-5, rtol=0)
    loss_of_rows(models["sound"](tokens[:1], real[:1]), real[:1]).backward()
    assert_gradients_equal(bank, "sound", models["sound"], atol=1e-3, rtol=1e-3)


def test_another_activation_or_placement_in_one_place(decoder):
    model = decoder().double()
    recipes = [
        BottleneckAdapter(bottleneck=width, placement=placement, activation=activation, scale=scale)
        for width, placement, activation, scale in itertools.product(
            (2, 5), ("pfeiffer", "parallel"), ("relu", "gelu", "gelu_tanh"), (1.0, 3.0)
        )
    ]
    models = {str(recipe): alone(model, seed, [recipe]) for seed, recipe in enumerate(recipes)}
    bank, (tokens, _) = TaskBank(copy.deepcopy(model), models), rows_of(len(models))
    logits = bank(tokens, tasks=list(models))
    for row, (name, single) in enumerate(models.items()):
        torch.testing.assert_close(logits[row], single(tokens[row : row + 1])[0], atol=1e-11, rtol=0, msg=name)

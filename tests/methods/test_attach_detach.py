"""Names, and what attach and detach leave behind, also when something goes wrong."""

from dataclasses import dataclass

import pytest
import torch
from reference.method_cases import RECIPES, SETS, assert_same, batch, fingerprint, loss_of, outputs, train_a_little
from torch import nn

import peft
from minitransformer.heads import SequenceClassifier
from minitransformer.tasks import Dataset
from minitransformer.training import fit, label_loss
from peft import LoRA
from peft.method import Wrapper
from peft.sites import arrange, find, in_order, sites_of


@pytest.mark.parametrize(
    "target, name, expected",
    [
        ("query", "blocks.0.attention.query", True),
        ("attention.query", "blocks.0.attention.query", True),
        ("blocks.0.attention.query", "blocks.0.attention.query", True),
        ("query", "blocks.0.attention.query_norm", False),
        ("query", "blocks.0.attention.my_query", False),
        ("norm", "blocks.0.query_norm", False),
        ("tion.query", "blocks.0.attention.query", False),
        ("0.attention.query", "blocks.10.attention.query", False),
        ("attention", "blocks.0.attention.query", False),
        ("bias", "debiased", False),
        ("a.b.c", "b.c", False),
        ("", "query", False),
    ],
)
def test_targets_match_by_whole_name_parts(target, name, expected):
    if expected:
        assert find((target,), [name, "other.map"], "map") == [name]
    else:
        with pytest.raises(ValueError, match="matches no map"):
            find((target,), [name], "map")


def test_a_layer_whose_name_only_contains_the_target_is_left_alone(decoder):
    model = decoder()
    model.query_norm = nn.Linear(16, 16)
    model.blocks[0].debiased_query = nn.Linear(16, 16)
    peft.attach(model, LoRA(rank=2, targets=("query",)))
    assert {name.rsplit(".", 1)[0] for name in peft.state_dict(model)} == {
        "blocks.0.attention.query",
        "blocks.1.attention.query",
    }


def test_an_unmatched_target_lists_what_exists_even_beside_one_that_matches(decoder):
    model = decoder()
    before = fingerprint(model)
    for targets in (("query", "valeu"), ("valeu",), ("blocks.2.attention.value", "query"), ("norm_attention",)):
        with pytest.raises(ValueError) as error:
            peft.attach(model, LoRA(rank=2, targets=targets))
        wrong = next(t for t in targets if t != "query")
        assert repr(wrong) in str(error.value) and "down, key, output, query, up, value" in str(error.value)
        assert_same(before, fingerprint(model))
    with pytest.raises(ValueError, match=r"'classifier' matches no module; there are .*head"):
        peft.attach(SequenceClassifier(model, 2), LoRA(rank=2), train_also=("classifier",))


def test_a_single_word_instead_of_a_tuple_is_explained(unchecked, decoder):
    with pytest.raises(ValueError, match="tuple"):
        peft.attach(SequenceClassifier(decoder(), 2), LoRA(rank=2), train_also="head")


@pytest.mark.parametrize("method", ["lora", LoRA, None], ids=str)
def test_something_that_is_no_recipe_is_explained(unchecked, decoder, method):
    with pytest.raises(ValueError, match="not a recipe"):
        peft.attach(decoder(), method)


@pytest.mark.parametrize("name", ["prefix kv", "prompt", "houlsby"])
def test_a_model_without_a_place_for_the_method_is_refused(name):
    with pytest.raises(ValueError, match="nowhere to enter"):
        peft.attach(nn.Sequential(nn.Linear(2, 2)), RECIPES[name])


class WrapsNothing(LoRA):
    def wrappers(self, modules, model, generator):
        return {}


def test_a_method_of_the_readers_own_that_wraps_nothing_is_refused(decoder):
    model = decoder()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="nowhere to enter"):
        peft.attach(model, WrapsNothing(rank=2))
    assert_same(before, fingerprint(model))


def test_lora_works_on_any_module_with_linear_maps():
    torch.manual_seed(0)  # PyTorch's own draw: an unlucky one leaves every ReLU shut, and nothing a gradient
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    peft.attach(model, LoRA(rank=2, targets=("0", "2")))
    x = torch.ones(4, 3)
    peft.gradient_audit(model, lambda m: m(x).square().mean())


CLASHES = [
    ("lora", "lora"),
    ("lora", "lora all"),
    ("prefix kv", "prefix hidden"),
    ("prefix mlp", "prefix kv"),
    ("prefix kv", "prefix mlp"),
    ("prompt", "prompt normal"),
    ("houlsby", "pfeiffer"),
    ("parallel", "houlsby"),
    ("inside_ffn", "inside_ffn"),
]


@pytest.mark.parametrize("first, second", CLASHES)
def test_attaching_twice_by_accident_is_refused_and_changes_nothing(decoder, first, second):
    model = peft.attach(decoder(), RECIPES[first])
    before, out = fingerprint(model), outputs(model)
    with pytest.raises(ValueError, match=r"carries a .* already.*detach"):
        peft.attach(model, RECIPES[second])
    assert_same(before, fingerprint(model))
    assert torch.equal(outputs(model), out)


def test_two_loras_on_different_targets_may_stand_together(tiny):
    model = peft.attach(peft.attach(tiny(), LoRA(rank=2, targets=("query",))), LoRA(rank=1, targets=("value",)))
    peft.gradient_audit(model, loss_of)
    assert len(peft.attached(model)) == 2


@dataclass(frozen=True)
class BreaksHalfway(LoRA):
    """A recipe whose third wrapper cannot be made."""

    def wrap(self, name, module, model, generator):
        if name.startswith("blocks.1"):
            raise RuntimeError("halfway")
        return super().wrap(name, module, model, generator)


@pytest.mark.parametrize("before_it", [[], ["prefix mlp", "houlsby"]], ids=["fresh", "second"])
@pytest.mark.parametrize(
    "method, also", [(BreaksHalfway(rank=2), ()), (LoRA(rank=17), ()), (LoRA(rank=2), ("nothing",))], ids=str
)
def test_an_attach_that_fails_halfway_leaves_the_model_as_it_was(tiny, before_it, method, also):
    model = tiny()
    model.blocks[0].norm_attention.weight.requires_grad_(False)
    for name in before_it:
        peft.attach(model, RECIPES[name])
    before, out = fingerprint(model), outputs(model)
    with pytest.raises((RuntimeError, ValueError)):
        peft.attach(model, method, train_also=also)
    assert_same(before, fingerprint(model))
    assert torch.equal(outputs(model), out)


@pytest.mark.parametrize("recipes", SETS.values(), ids=SETS.keys())
def test_detach_gives_the_very_same_modules_weights_and_gradient_flags_back(tiny, recipes):
    model = tiny()
    model.embedding.position.weight.requires_grad_(False)
    before = fingerprint(model)
    for recipe in recipes:
        peft.attach(model, recipe)
    assert {id(p) for p in model.parameters() if p.requires_grad}.isdisjoint(i for i, *_ in before[1].values())
    train_a_little(model)
    assert peft.detach(model) is model
    assert_same(before, fingerprint(model))


def test_attach_returns_the_model_and_prints_its_wrappers(tiny):
    model = tiny()
    assert peft.attach(model, RECIPES["lora"]) is model
    assert "LoRALinear" in repr(model) and "A=[2, 16], B=[16, 2], scale=1.5, train=A+B\n" in repr(model)
    record = peft.attached(model)[0]
    assert (record.method, record.seed) == (RECIPES["lora"], 0)
    assert "key=[3, 16], value=[3, 16]\n" in repr(peft.attach(model, RECIPES["prefix kv"]))


@pytest.mark.parametrize("operation", [peft.detach, peft.state_dict, lambda m: peft.disabled(m).__enter__()])
def test_operations_without_a_method_say_so(decoder, operation):
    with pytest.raises(ValueError, match="no method is attached"):
        operation(decoder())


@pytest.mark.parametrize("defect", ["missing", "unexpected", "shape", "nan"])
def test_load_state_dict_refuses_what_does_not_fit_and_changes_nothing(decoder, defect):
    model = train_a_little(peft.attach(decoder(), RECIPES["lora"]))
    tensors = {name: t + 1 for name, t in peft.state_dict(model).items()}
    last = list(tensors)[-1]
    if defect == "missing":
        del tensors[last]
    elif defect == "unexpected":
        tensors["blocks.9.attention.query.A"] = torch.zeros(2, 16)
    else:
        tensors[last] = torch.zeros(16, 3) if defect == "shape" else tensors[last] * float("nan")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=last.replace(".", r"\.") if defect != "unexpected" else "unexpected"):
        peft.load_state_dict(model, tensors)
    assert_same(before, fingerprint(model))


# A head that is trained whole


def classified(decoder, seed=0):
    return SequenceClassifier(decoder(causal=False), n_classes=3, seed=seed)


def test_a_fresh_head_is_trained_whole_beside_the_method_and_travels_with_it(decoder, tmp_path):
    model = classified(decoder)
    peft.attach(model, LoRA(rank=2), train_also=("head",))
    assert {"head.weight", "head.bias"} <= peft.trainable_parameters(model).keys()
    tokens, mask = batch()
    targets = torch.tensor([0, 1, 2])
    history = fit(
        model, Dataset(tokens, mask, targets), steps=5, objective=label_loss, learning_rate=0.05, progress=False
    )
    assert history.loss[-1] < history.loss[0]
    peft.gradient_audit(model, lambda m: label_loss(m, Dataset(tokens, mask, targets)).loss)
    assert {"head.weight", "head.bias"} <= peft.state_dict(model).keys()
    peft.save(model, tmp_path / "with_head")
    fresh = peft.load(classified(decoder, seed=9), tmp_path / "with_head")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(tokens, mask), model.eval()(tokens, mask))
    assert peft.parameter_table(model).trained == 2 * 2 * 2 * (16 + 16) + 3 * 16 + 3


def test_lora_does_not_land_on_the_head(decoder):
    model = peft.attach(classified(decoder), LoRA(rank=2, targets=peft.ALL_LINEARS), train_also=("head",))
    assert type(model.head) is nn.Linear


def test_a_head_that_is_not_named_stays_frozen(decoder):
    model = peft.attach(classified(decoder), LoRA(rank=2))
    assert not model.head.weight.requires_grad


def test_train_also_does_not_unfreeze_a_factor_that_the_recipe_freezes(decoder):
    model = peft.attach(decoder(), LoRA(rank=2, train=("B",)))
    peft.attach(model, RECIPES["parallel"], train_also=("query",))
    assert not model.blocks[0].attention.query.A.requires_grad
    assert model.blocks[0].attention.query.base.weight.requires_grad


def test_fit_refuses_an_optimizer_made_before_the_second_method(decoder):
    """Nothing of the second method would ever move."""
    model = peft.attach(decoder(), RECIPES["lora"])
    optimizer = torch.optim.AdamW(peft.trainable_parameters(model).values(), lr=1e-3)
    tokens, mask = batch()
    data = Dataset(tokens, mask, tokens[:, 0])
    fit(model, data, steps=1, optimizer=optimizer, progress=False)
    peft.attach(model, RECIPES["houlsby"])
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"does not hold 16 trainable tensors.*after the last\s+attach"):
        fit(model, data, steps=1, optimizer=optimizer, progress=False)
    assert_same(before, fingerprint(model))


def test_find_keeps_the_order_of_the_model():
    candidates = dict.fromkeys(["b.x", "a.y", "a.x"])
    assert find(("y", "x"), candidates, "thing") == ["b.x", "a.y", "a.x"]


def test_names_are_sorted_as_a_reader_counts():
    """blocks.2 before blocks.10, and words before numbers."""
    names = ["blocks.10.a", "blocks.2.b", "blocks.2.a", "blocks.2.1", "aside.3"]
    assert in_order(names) == ["aside.3", "blocks.2.a", "blocks.2.b", "blocks.2.1", "blocks.10.a"]


@pytest.mark.parametrize("place", ["outermost", "between", "innermost"])
def test_exchanging_one_wrapper_leaves_those_round_it_and_in_it(decoder, place):
    model = decoder()
    for recipe in (RECIPES["lora"], RECIPES["ia3"], RECIPES["bitfit"]):
        peft.attach(model, recipe)
    site = sites_of(model)["blocks.0.attention.value"]
    before = list(site.wrappers)
    index = {"outermost": 0, "between": 1, "innermost": 2}[place]
    new = Wrapper(before[index].base)
    arrange(site, [new if wrapper is before[index] else wrapper for wrapper in before])
    after = sites_of(model)["blocks.0.attention.value"]
    assert after.wrappers == site.wrappers and after.module is site.module
    assert [found is new for found in after.wrappers] == [i == index for i in range(3)]
    assert [found for found in after.wrappers if found is not new] == before[:index] + before[index + 1 :]
    assert after.wrappers[-1].base is site.module and model.blocks[0].attention.value is after.wrappers[0]

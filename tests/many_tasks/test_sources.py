"""What a bank takes: sources of its own base, whole, from wherever they come; and a model that nothing else has."""

import copy
from pathlib import Path

import pytest
import torch
from reference.bank_cases import TASKS, alone, rows_of
from reference.method_cases import RECIPES, assert_same, fingerprint

import peft
from peft import LoRA, PrefixTuning, TaskBank
from peft.checkpoint import attached


def refused(make, model, message):
    before, modes = fingerprint(model), [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        make()
    assert_same(before, fingerprint(model))
    assert modes == [module.training for module in model.modules()]


def file_of(model, path):
    peft.save(model, path)
    return path


FORMS = {
    "model": lambda single, path: single,
    "file": lambda single, path: file_of(single, path / "source.safetensors"),
    "name of a file": lambda single, path: str(file_of(single, path / "source.safetensors")),
    "list": lambda single, path: [(attached(single)[0].method, peft.state_dict(single))],
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
from_a_base = pytest.mark.parametrize("form", [FORMS["model"], FORMS["file"]], ids=["model", "file"])


@each_form
@pytest.mark.parametrize("name", ["lora all", "hidden prefix", "houlsby"])
def test_every_form_of_a_source_gives_the_same(decoder, tmp_path, form, name):
    model = decoder().double()
    single = alone(model, 1, TASKS[name])
    bank = TaskBank(model, {"x": form(single, tmp_path)})
    tokens, _ = rows_of(2)
    torch.testing.assert_close(bank(tokens, tasks=["x", "x"]), single(tokens), atol=1e-11, rtol=0)
    assert all(torch.equal(t, peft.state_dict(single)[n]) for n, t in bank.tensors("x").items())


@each_form
def test_a_merged_source_is_what_it_is_unmerged(decoder, tmp_path, form):
    model = decoder().double()
    single = alone(model, 1, TASKS["lora"])
    tokens, _ = rows_of(2)
    expected = single(tokens)
    bank = TaskBank(model, {"x": form(peft.merge(single), tmp_path), "y": form(single, tmp_path)})
    torch.testing.assert_close(bank(tokens, tasks=["x", "y"]), expected, atol=1e-11, rtol=0)
    with bank.using([None, None]):
        torch.testing.assert_close(bank.model(tokens), decoder().double()(tokens), atol=1e-11, rtol=0)


OTHER_BASES = {
    "other weights": {"seed": 5},
    "narrower": {"d_model": 8},
    "deeper": {"n_layers": 3},
    "longer": {"max_len": 20},
}


@from_a_base
@pytest.mark.parametrize("changes", OTHER_BASES.values(), ids=OTHER_BASES)
def test_a_source_of_another_base_is_refused(decoder, tmp_path, form, changes):
    model = decoder()
    other = form(alone(decoder(**changes), 1, TASKS["lora"]), tmp_path)
    good = alone(model, 1, TASKS["prefix"])
    sources = {"good": good, "better": good, "bad": other, "fine": good}
    refused(lambda: TaskBank(model, sources), model, "the source of bad .* is unfit: ")


@pytest.mark.parametrize("changes", [{"d_model": 8}, {"n_layers": 3}, {"d_ff": 32}], ids=str)
@pytest.mark.parametrize("name", ["lora all", "prefix", "hidden prefix", "inside_ffn"])
def test_tensors_that_do_not_fit_this_model_are_refused(decoder, changes, name):
    unseen = {"inside_ffn": "d_model", "prefix": "d_ff", "hidden prefix": "d_ff"}  # axes that its tensors do not have
    if unseen.get(name) in changes:
        changes = {"d_model": 8, "d_ff": 32}
    model, recipes = decoder(), TASKS[name]
    tensors = peft.state_dict(alone(decoder(**changes), 1, recipes))
    refused(lambda: TaskBank(model, {"x": [(recipes[0], tensors)]}), model, "the source of x .*(has shape|unexpected)")


def test_a_source_in_another_precision(decoder):
    """As a model it is of another base; its tensors may enter, in the precision of the bank's model."""
    single, model = alone(decoder(), 1, TASKS["lora"]), decoder().double()
    refused(lambda: TaskBank(model, {"x": single}), model, "its base is another .weights, shape, precision")
    bank = TaskBank(model, {"x": [(*TASKS["lora"], peft.state_dict(single))]})
    tokens, _ = rows_of(2)
    logits = bank(tokens, tasks=["x", "x"])
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), single(tokens), atol=1e-4, rtol=0)


def damaged(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    return path


def unfit_sources(model, path):
    """Sources that a bank cannot take, each with what it says."""
    lora = alone(model, 1, TASKS["lora"])
    whole = peft.attach(copy.deepcopy(model), LoRA(rank=2), train_also=("norm",))
    torch.nn.init.constant_(whole.norm.weight, 7.0)
    tensors = peft.state_dict(lora)
    broken = {name: tensor * torch.nan for name, tensor in tensors.items()}
    yield "whole modules", whole, "trains whole modules beside its method"
    yield "file, whole modules", file_of(whole, path / "whole"), "trains whole modules beside its method"
    yield "file, damaged", damaged(file_of(lora, path / "damaged")), "damaged"
    yield "nothing attached", copy.deepcopy(model), "no method is attached"
    yield "NaN", [(*TASKS["lora"], broken)], "a NaN or an infinity"
    yield "rank", [(LoRA(rank=3), tensors)], "has shape"
    yield "missing", [(*TASKS["lora"], dict(list(tensors.items())[:3]))], "5 missing"
    yield "unexpected", [(LoRA(rank=2, targets=("query",)), tensors)], "4 unexpected"
    yield "twice", [(*TASKS["lora"], tensors), (PrefixTuning(length=3), tensors)], "same name"
    yield "no list", (LoRA(rank=2), tensors), "the source of bad"
    yield "no recipe", [("lora", tensors)], "'lora' is not a recipe"
    yield "no tensors", [(LoRA(rank=2), None)], "file, model, or recipes with tensors"
    yield "a number", 5, "file, model, or recipes with tensors"
    yield "nothing", None, "file, model, or recipes with tensors"
    for name in ("dora", "prefix gated", "prefix mlp", "prompt", "bitfit", "ia3", "ln_tuning", "vera"):
        yield name, alone(model, 1, (RECIPES[name],)), "cannot share a batch with other tasks"


@pytest.mark.usefixtures("unchecked")
def test_a_bank_that_cannot_be_made_leaves_the_model_as_it_was(decoder, tmp_path):
    model = decoder()
    model.blocks[1].train()
    model.blocks[0].requires_grad_(False)
    good = alone(model, 1, TASKS["mam"])
    for _, source, message in unfit_sources(model, tmp_path):
        refused(lambda s=source: TaskBank(model, {"a": good, "b": good, "bad": s, "c": good}), model, message)
        refused(lambda s=source: TaskBank(model, {"bad": s}), model, "the source of bad")
    before = fingerprint(model)
    with pytest.raises(FileNotFoundError):
        TaskBank(model, {"a": good, "bad": Path("nowhere.safetensors")})
    assert_same(before, fingerprint(model))
    refused(lambda: TaskBank(model, {}), model, "give tasks by name")


def test_lora_on_a_head_is_refused(tiny):
    """A head reads the hidden states that are asked for, of whatever rows they are."""
    model = tiny(lm_head="bert")
    single = alone(model, 1, [LoRA(rank=2, targets=("head.dense", "query"))])
    refused(lambda: TaskBank(model, {"x": single}), model, "LoRA in blocks, adapters and plain prefixes can")


def test_nothing_else_may_be_on_the_model(decoder):
    model = decoder()
    sources = {"a": alone(model, 1, TASKS["lora"])}
    carrying = peft.attach(decoder(), LoRA(rank=2, targets=("up",)))
    refused(lambda: TaskBank(carrying, sources), carrying, r"detach\(model\) first")
    bank, (tokens, _) = TaskBank(model, sources, trainable=True), rows_of(2)
    before = bank(tokens, tasks=["a", None])
    refused(lambda: TaskBank(model, sources), model, r"detach\(model\) first")
    refused(lambda: peft.detach(model), model, "no method is attached")
    refused(lambda: peft.save(model, "x.safetensors"), model, "no method is attached")
    assert torch.equal(bank(tokens, tasks=["a", None]), before)


@pytest.mark.parametrize("recipe", [LoRA(rank=2, targets=("up",)), LoRA(rank=2), RECIPES["houlsby"]], ids=str)
def test_no_method_enters_beside_a_bank(decoder, recipe):
    model = decoder()
    bank = TaskBank(model, {"a": alone(model, 1, TASKS["lora"])}, trainable=True)
    refused(lambda: peft.attach(model, recipe), model, "detach")
    assert any(p.requires_grad for p in bank.parameters())


def test_a_detached_bank_answers_nothing(decoder):
    model = decoder()
    sources = {"a": alone(model, 1, TASKS["lora"])}
    bank, (tokens, _) = TaskBank(model, sources), rows_of(1)
    assert bank.detach() is model
    before = fingerprint(model)
    another = TaskBank(model, sources)  # whose wrappers are not those of the first
    for ask in (
        lambda: bank(tokens, tasks=["a"]),
        lambda: bank.generate(tokens, 2, tasks=["a"]),
        lambda: bank.using(["a"]).__enter__(),
        lambda: bank.tensors("a"),
        bank.detach,
    ):
        refused(ask, model, "this bank is detached from its model; make a new one")
    assert another.detach() is model
    assert_same(before, fingerprint(model))

"""Many tasks in one batch: each row as it is alone, in its value and in the gradients of its task's tensors."""

import copy
import itertools

import pytest
import torch
from reference.bank_cases import TASKS, alone, assert_gradients_equal, everything, loss_of_rows, rows_of
from reference.method_cases import assert_same, fingerprint

import peft
from peft import LoRA, TaskBank


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_row_is_what_it_is_alone(tiny, side):
    model = tiny().double().eval()
    models = everything(model)
    order = [*TASKS, None, "prefix", "lora", None, "mam"]
    order = [order[i] for i in torch.randperm(len(order), generator=torch.Generator().manual_seed(7))]
    tokens, real = rows_of(len(order), side=side)
    bank = TaskBank(copy.deepcopy(model), models)
    with torch.no_grad():
        logits = bank(tokens, real, tasks=order)
        for row, task in enumerate(order):
            single = model if task is None else models[task]
            expected = single(tokens[row : row + 1], real[row : row + 1])
            torch.testing.assert_close(logits[row][real[row]], expected[0][real[row]], atol=1e-12, rtol=0)


def test_without_padding_a_batch_of_one_and_rows_all_of_one_task(decoder):
    model = decoder().double()
    models = {name: alone(model, 3, TASKS[name]) for name in ("lora", "prefix", "houlsby")}
    bank, tokens = TaskBank(copy.deepcopy(model), models), rows_of(3)[0]
    for task, single in [(None, model), *models.items()]:
        for n in (1, 3):
            torch.testing.assert_close(bank(tokens[:n], tasks=[task] * n), single(tokens[:n]), atol=1e-12, rtol=0)


def test_generation_with_and_without_cache(decoder):
    model = decoder(max_len=20)
    models = everything(model)
    order = [*TASKS, None]
    tokens, real = rows_of(len(order), side="left")
    bank = TaskBank(copy.deepcopy(model), models)
    words = bank.generate(tokens, 5, padding_mask=real, tasks=order)
    assert torch.equal(words, bank.generate(tokens, 5, padding_mask=real, tasks=order, use_cache=False))
    for row, task in enumerate(order):
        single = model if task is None else models[task]
        assert torch.equal(
            words[row], single.generate(tokens[row : row + 1], 5, padding_mask=real[row : row + 1])[0]
        ), task


def test_the_gradient_of_each_task_is_what_its_rows_give_alone(tiny):
    model = tiny().double()
    models = everything(model)
    order = [*TASKS, None, *TASKS]
    tokens, real = rows_of(len(order))

    bank = TaskBank(copy.deepcopy(model), models, trainable=True)
    loss_of_rows(bank(tokens, real, tasks=order), real).backward()
    assert all(p.grad is None for name, p in peft.sites.named_tensors(bank.model).items() if not p.requires_grad)
    for name, single in models.items():
        rows = torch.tensor([row for row, task in enumerate(order) if task == name])
        loss_of_rows(single(tokens[rows], real[rows]), real[rows]).backward()
        assert_gradients_equal(bank, name, single)


def test_training_moves_the_tasks_in_the_batch_and_nothing_else(decoder):
    model = decoder()
    before = {name: p.clone() for name, p in model.named_parameters()}
    models = everything(model)
    bank = TaskBank(model, models, trainable=True)
    learning = [p for p in bank.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.01, weight_decay=0.0)
    tokens, real = rows_of(4)
    for _ in range(3):
        optimizer.zero_grad()
        bank(tokens, real, tasks=["lora", "mam", None, "houlsby"]).logsumexp(-1).sum().backward()
        optimizer.step()
    for name, single in models.items():
        now, start = bank.tensors(name), peft.state_dict(single)
        assert now.keys() == start.keys()
        moved = {tensor for tensor in now if not torch.equal(now[tensor], start[tensor])}
        assert bool(moved) == (name in ("lora", "mam", "houlsby")), name
    bank.detach()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_task_trained_in_the_bank_goes_back_into_a_file(decoder, tmp_path):
    model = decoder()
    models = {"a": alone(model, 1, TASKS["mam"]), "b": alone(model, 2, TASKS["lora"])}
    bank = TaskBank(copy.deepcopy(model), models)
    again = peft.attach(peft.attach(decoder(), TASKS["mam"][0]), TASKS["mam"][1])
    peft.load_state_dict(again, bank.tensors("a"))
    peft.save(again, tmp_path / "a.safetensors")
    tokens, real = rows_of(3)
    assert torch.equal(peft.load(decoder(), tmp_path / "a.safetensors")(tokens, real), models["a"](tokens, real))


def test_sources_may_be_files_models_or_recipes_with_tensors(decoder, tmp_path):
    model = decoder()
    single = alone(model, 1, TASKS["lora"])
    peft.save(single, tmp_path / "lora.safetensors")
    recipes = [(TASKS["lora"][0], peft.state_dict(single))]
    bank = TaskBank(model, {"file": tmp_path / "lora.safetensors", "model": single, "tensors": recipes})
    tokens, _ = rows_of(1)
    out = bank(tokens.expand(3, -1), tasks=["file", "model", "tensors"])
    assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2])
    torch.testing.assert_close(out[:1], single(tokens), atol=1e-6, rtol=0)


def test_dropout_falls_on_the_rows_of_its_task_only(decoder):
    model = decoder()
    models = {"wet": alone(model, 1, (LoRA(rank=2),)), "dry": alone(model, 1, (LoRA(rank=2, dropout=0.5),))}
    bank = TaskBank(copy.deepcopy(model), models).train()
    tokens, _ = rows_of(1)
    tasks = ["wet", "dry", None]
    first, second = bank(tokens.expand(3, -1), tasks=tasks), bank(tokens.expand(3, -1), tasks=tasks)
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert not torch.allclose(first[1], second[1])
    bank.eval()
    assert torch.equal(*(bank(tokens.expand(2, -1), tasks=["wet", "dry"])[i] for i in (0, 1)))


def test_dropout_keeps_the_mean(decoder):
    model = decoder().double()
    bank = TaskBank(model, {"a": alone(model, 1, (LoRA(rank=2, dropout=0.3),))}).train()
    lora = model.blocks[0].attention.query
    x = torch.ones(1, 1, 16, dtype=torch.float64)
    torch.manual_seed(0)
    with bank.using(["a"]):
        dropped = torch.cat([lora.dropped(x) for _ in range(2000)])
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.7}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert len(bank.names) == 1


def test_detach_gives_the_very_same_modules_back(decoder):
    model = decoder()
    model.blocks[0].requires_grad_(False)
    before = fingerprint(model)
    models = everything(copy.deepcopy(model))
    bank = TaskBank(model, models)
    assert not any(p.requires_grad for p in bank.parameters())
    assert bank.detach() is model
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["lora", "opera"], "there is no task opera; there are lora, prefix, and None"),
        (["lora"], "1 tasks are named for 2 rows; name one for each"),
        (["lora", None, None], "3 tasks are named for 2 rows; name one for each"),
        ("lora", "1 tasks are named for 2 rows; name one for each"),
    ],
)
def test_unknown_names_and_wrong_lengths(decoder, tasks, message):
    model = decoder()
    bank = TaskBank(model, {name: alone(model, 1, TASKS[name]) for name in ("lora", "prefix")})
    tokens, _ = rows_of(2)
    for call in (bank, lambda tokens, tasks: bank.generate(tokens, 1, tasks=tasks)):
        with pytest.raises(ValueError, match=message):
            call(tokens, tasks=tasks)
    with bank.using([None]), pytest.raises(ValueError, match="1 tasks are named for 2 rows"):
        bank.model(tokens)
    with pytest.raises(ValueError, match="say which task each row is under"):
        bank.model(tokens)
    with pytest.raises(ValueError, match="there is no task opera"):
        bank.tensors("opera")


def test_the_cost_grows_with_the_tokens_and_not_with_the_tasks(decoder):
    """Counted, not timed: a batch takes as many multiplications under one task as under sixteen."""
    from torch.utils.flop_counter import FlopCounterMode

    model = decoder()
    models = {str(seed): alone(model, seed, TASKS["lora all"]) for seed in range(16)}
    tokens, counts = rows_of(16)[0], {}
    for k in (1, 16):
        bank = TaskBank(copy.deepcopy(model), dict(itertools.islice(models.items(), k)))
        with FlopCounterMode(display=False) as counter:
            bank(tokens, tasks=[str(row % k) for row in range(16)])
        counts[k] = counter.get_total_flops()
    assert counts[1] == counts[16]

"""Which row is under which task belongs to one pass: not to another thread, nor to whoever asks next."""

import copy
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from reference.bank_cases import TASKS, alone, assert_gradients_equal, loss_of_rows, rows_of

from peft import LoRA, PrefixTuning, TaskBank

BOTH = {"a": TASKS["lora all"], "b": TASKS["mam"]}


def two_tasks(build, trainable=False, gradient_checkpointing=False, **sizes):
    """A bank of two tasks, and each alone."""
    model = build(**sizes).double().eval()
    models = {name: alone(model, seed, BOTH[name]) for seed, name in enumerate(BOTH)}
    return TaskBank(
        build(gradient_checkpointing=gradient_checkpointing, **sizes).double().eval(), models, trainable
    ), models


def in_threads(*jobs, times=150):
    """Each job in a thread of its own, again and again, all at the same time; how often each was wrong."""
    start, wrong = threading.Barrier(len(jobs)), [0] * len(jobs)

    def repeat(number, job):
        start.wait()
        for _ in range(times):
            try:
                wrong[number] += not job()
            except Exception:
                wrong[number] += 1

    threads = [threading.Thread(target=repeat, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.mark.usefixtures("unchecked")
def test_two_threads_get_the_answers_of_their_own_tasks(decoder):
    bank, models = two_tasks(decoder)
    tokens, _ = rows_of(2)
    right = {name: single(tokens).detach() for name, single in models.items()}

    def ask(*tasks):
        expected = torch.stack([right[task][row] for row, task in enumerate(tasks)])

        def job():
            with torch.no_grad():
                return torch.allclose(bank(tokens, tasks=tasks), expected, atol=1e-10)

        return job

    assert in_threads(ask("a", "a"), ask("b", "b"), ask("b", "a")) == [0, 0, 0]


@pytest.mark.usefixtures("unchecked")
def test_two_threads_generate_under_their_own_tasks(decoder):
    bank, models = two_tasks(decoder, max_len=20)
    tokens, _ = rows_of(2)
    right = {name: single.generate(tokens, 5) for name, single in models.items()}
    assert not torch.equal(right["a"], right["b"])

    def ask(task):
        return lambda: torch.equal(bank.generate(tokens, 5, tasks=[task] * 2), right[task])

    assert in_threads(ask("a"), ask("b"), times=15) == [0, 0]


def test_a_thread_of_its_own_does_not_know_what_is_told_outside(decoder):
    bank, models = two_tasks(decoder)
    tokens, _ = rows_of(2)

    def asks_nothing():
        with pytest.raises(ValueError, match="say which task each row is under"):
            bank.model(tokens)
        return True

    with bank.using(["a", "b"]):
        assert in_threads(asks_nothing, times=1) == [0]
        torch.testing.assert_close(bank.model(tokens)[0], models["a"](tokens)[0])


def test_using_nests_and_is_undone_after_an_exception(decoder):
    bank, models = two_tasks(decoder)
    tokens, _ = rows_of(1)
    with bank.using(["a"]):
        with pytest.raises(RuntimeError), bank.using(["b"]):
            torch.testing.assert_close(bank.model(tokens), models["b"](tokens))
            raise RuntimeError
        torch.testing.assert_close(bank.model(tokens), models["a"](tokens))
    with pytest.raises(ValueError, match="say which task"):
        bank.model(tokens)


@pytest.mark.parametrize("backward_inside", [None, ["b", "b", None], ["b"]])
@pytest.mark.parametrize("in_a_thread", [False, True])
def test_what_is_recomputed_is_under_the_tasks_of_the_forward_pass(tiny, backward_inside, in_a_thread):
    bank, models = two_tasks(tiny, trainable=True, gradient_checkpointing=True)
    tokens, real = rows_of(3)
    with bank.using(["a", None, "b"]):
        loss = loss_of_rows(bank.model(tokens, real), real)

    def backward():
        if backward_inside is None:
            loss.backward()
            return True
        with bank.using(backward_inside):
            loss.backward()
        return True

    assert in_threads(backward, times=1) == [0] if in_a_thread else backward()
    for row, name in ((0, "a"), (2, "b")):
        own = slice(row, row + 1)
        loss_of_rows(models[name](tokens[own], real[own]), real[own]).backward()
        assert_gradients_equal(bank, name, models[name])


def test_two_banks_inside_each_other_know_their_own_rows(decoder):
    (bank, models), (other, _) = two_tasks(decoder), two_tasks(decoder)
    tokens, _ = rows_of(2)
    with bank.using(["a", "b"]), other.using(["b", "b"]):
        torch.testing.assert_close(bank.model(tokens)[0], models["a"](tokens)[0])
        torch.testing.assert_close(other.model(tokens)[0], models["b"](tokens)[0])


def pickled(bank):
    file = io.BytesIO()
    torch.save(bank, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_bank_of_its_own(decoder, copied):
    bank, models = two_tasks(decoder)
    tokens, _ = rows_of(2)
    with bank.using(["b", "b"]):  # of which the copy knows nothing
        twin = copied(bank)
        with pytest.raises(ValueError, match="say which task"):
            twin.model(tokens)
        torch.testing.assert_close(twin(tokens, tasks=["a", "b"])[0], models["a"](tokens)[0])
    with torch.no_grad():
        for _, mixed in twin.mixed:
            for tensor in mixed.tensors().values():
                tensor.zero_()
    assert not any(t.any() for t in twin.tensors("a").values())
    twin.detach()
    for row, task in enumerate(["a", "b"]):
        torch.testing.assert_close(bank(tokens, tasks=["a", "b"])[row], models[task](tokens)[row])


def test_a_state_dict_fits_a_bank_whose_tasks_came_in_another_order(decoder):
    bank, models = two_tasks(decoder)
    other = alone(decoder().double(), 5, TASKS["lora all"]), alone(decoder().double(), 6, TASKS["mam"])
    twin = TaskBank(decoder().double().eval(), {"b": other[1], "a": other[0]})
    twin.load_state_dict(bank.state_dict())
    tokens, _ = rows_of(2)
    logits = twin(tokens, tasks=["a", "b"])
    for row, task in enumerate(["a", "b"]):
        torch.testing.assert_close(logits[row], models[task](tokens)[row])


def test_all_that_a_pass_needs_is_on_the_device_of_its_wrapper(decoder):
    bank, _ = two_tasks(decoder)
    bank.to("meta")
    x = torch.empty(3, 5, 16, dtype=torch.float64, device="meta")
    with bank.using(["a", None, "b"]):
        for block in bank.train().model.blocks:
            x = block(x, "causal")
    assert x.is_meta


def test_attention_weights_are_those_of_each_row(decoder):
    bank, models = two_tasks(decoder)
    tokens, _ = rows_of(2)
    with bank.using(["a", "b"]):
        weights = bank.model.attention_weights(tokens)
    for mine, plain, with_prefix in zip(weights, *(m.attention_weights(tokens) for m in models.values()), strict=True):
        torch.testing.assert_close(mine[0, ..., 4:], plain[0])
        torch.testing.assert_close(mine[1], with_prefix[1])


@pytest.mark.parametrize("name", ["lora", "mam", "hidden prefix", "houlsby"])
def test_under_autocast_rows_are_what_they_are_alone(decoder, name):
    model = decoder()
    single = alone(model, 1, TASKS[name])
    bank = TaskBank(copy.deepcopy(model), {"x": single})
    tokens, _ = rows_of(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, expected = bank(tokens, tasks=["x", None]), torch.stack([single(tokens)[0], model(tokens)[1]])
    torch.testing.assert_close(logits, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_a_bank_moves_with_its_model(decoder):
    bank, models = two_tasks(decoder)
    tokens, _ = rows_of(2)
    expected = models["b"](tokens)
    for dtype, atol in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        logits = bank.to(dtype)(tokens, tasks=["b", "b"])
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.double(), expected, atol=atol, rtol=0)


def test_long_prefixes_of_a_bank_in_bfloat16_keep_their_lengths(decoder):
    """Numbers above 256 are no longer exact there."""
    model = decoder().double()
    models = {str(n): alone(model, n, [PrefixTuning(length=n, init="normal")]) for n in (299, 301)}
    bank = TaskBank(copy.deepcopy(model), models).bfloat16().double()
    tokens, _ = rows_of(2)
    logits = bank(tokens, tasks=["299", "301"])
    for row, single in enumerate(models.values()):
        twin = copy.deepcopy(single).bfloat16().double()
        torch.testing.assert_close(logits[row], twin(tokens)[row], atol=1e-9, rtol=0)


def test_the_modes_are_those_of_the_model(decoder):
    model = decoder()
    source = {"a": alone(model, 1, [LoRA(rank=2, dropout=0.9)])}
    for training in (False, True):
        bank = TaskBank(decoder().train(training), source)
        assert {module.training for module in bank.modules()} == {training}
        tokens, _ = rows_of(1)
        again = [bank(tokens, tasks=["a"]) for _ in range(2)]
        assert torch.equal(*again) != training


@pytest.mark.slow
def test_one_graph_for_all_tasks():
    script = Path(__file__).with_name("compile_a_bank.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

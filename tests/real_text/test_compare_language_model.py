"""The comparisons of SmolLM2: what they start from, and one step of them."""

from dataclasses import replace

import pytest
import torch

from minitransformer.tasks.language.splits import pair_task
from peft import expected_parameters
from peft.experiments import compare, tasks
from peft.experiments.report import LANGUAGE_TASKS
from peft.experiments.tasks import LORA, LORA_ALL, PREFIX, PROMPT, TASKS


@pytest.mark.parametrize("name", LANGUAGE_TASKS)
def test_a_prefix_starts_from_the_words_that_are_said(chat, name):
    assert tuple(chat.encode(tasks.INIT_WORDS[name])) == tasks.INIT_TOKENS[name]
    entries = TASKS[name].entries
    assert entries[PREFIX].method.init_tokens == entries[PROMPT].method.init_tokens == tasks.INIT_TOKENS[name]


@pytest.mark.parametrize("name", LANGUAGE_TASKS)
def test_its_splits(chat, real_text, name):
    sizes = {"rotten_tomatoes_words": (3_393, 200, 1_000)}.get(name, (2_000, 64, 200))
    task = TASKS[name].splits()
    assert (len(task.train), len(task.validation), len(task.test)) == sizes and task.name == name
    assert task.max_new_tokens == {"movers": 4, "records": 35, "rotten_tomatoes_words": 2}[name]


def test_the_sizes_of_the_methods(language_model):
    """Counted by hand: 30 layers, 576 wide, of 3 heads of 64 for keys and values, 1,536 in the FFN."""
    expected = {LORA: 460_800, LORA_ALL: 2_442_240, PREFIX: 184_320, PROMPT: 9_216}
    entries = TASKS["movers"].entries
    assert {name: expected_parameters(language_model.config, entries[name].method) for name in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("backbone", TASKS["movers"].models)
def test_a_run_of_one_step(chat, backbone, monkeypatch):
    own = TASKS["movers"]
    entries = own.entries | {LORA: replace(own.entries[LORA], steps=1, choice_steps=None)}
    monkeypatch.setitem(TASKS, "movers", replace(own, entries=entries, warmup=0, note_every=1))
    whole = own.splits()
    task = pair_task(whole.texts, chat, validation=4, test=4)
    key = compare.planned("movers", LORA, "final", 1e-3, 1, backbone, inputs="known")
    row = compare.finished(key, task, progress=False)
    assert row["trained_parameters"] == "460800"
    assert row["validation_curve"] == f"1 {float(row['validation_accuracy']):.4f}"
    assert 0 < float(row["validation_loss"]) < 8 and 0 <= float(row["test_accuracy"]) <= 1
    assert row["precision"] == str(tasks.precision_of(backbone)).removeprefix("torch.")
    model = compare.model_for("movers", LORA, 0, backbone)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    has_four_bits = backbone.endswith((tasks.NF4, tasks.Q4_1))
    assert frozen == {tasks.precision_of(backbone)} | ({torch.uint8} if has_four_bits else set())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

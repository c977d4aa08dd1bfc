"""The sweep on the toy tasks, with few rows and two steps a run."""

from functools import partial

import pytest
import torch

from minitransformer import Transformer
from minitransformer.pretrained import toy_backbone
from minitransformer.training import evaluate
from peft import expected_parameters
from peft.experiments import compare, sweep
from peft.experiments.report import LANGUAGE_TASKS, RESULTS
from peft.experiments.results import COLUMNS, read_rows
from peft.experiments.tasks import TASKS

NAMES = ("full fine-tuning", "LoRA q,v r=4", "prefix k,v n=16")


@pytest.mark.slow
def test_the_whole_sweep_and_going_on_with_it(short, tmp_path, monkeypatch):
    out, entries = tmp_path / "results" / "rows.csv", TASKS["sentiment"].entries
    study = compare.study("sentiment", NAMES, progress=False)
    rows = sweep.run(study, out, seeds=(1,))
    assert rows == read_rows(out)
    assert [*rows[0]] == [*COLUMNS[:15], "test_by_kind", *COLUMNS[15:]]
    for name in NAMES:
        choice = [row for row in rows if row["method"] == name and row["stage"] == "choice"]
        (final,) = [row for row in rows if row["method"] == name and row["stage"] == "final"]
        assert tuple(float(row["learning_rate"]) for row in choice) == entries[name].learning_rates
        assert all(row["test_accuracy"] == row["test_by_kind"] == "" and row["seed"] == "0" for row in choice)
        assert float(final["learning_rate"]) == sweep.chosen_learning_rate(rows, name)
        assert 0.0 <= float(final["test_accuracy"]) <= 1.0 and int(final["steps"]) == 2
        method = entries[name].method
        trained = expected_parameters(toy_backbone().config, method) if method else 827_776
        assert int(final["trained_parameters"]) == trained and int(final["file_bytes"]) >= 4 * trained

    done, finished = [], compare.finished
    monkeypatch.setattr(compare, "finished", lambda key, *rest: done.append(key) or finished(key, *rest))
    again = sweep.run(study, out, seeds=(1, 2))
    assert [(key["method"], key["stage"], key["seed"]) for key in done] == [(name, "final", "2") for name in NAMES]
    assert again[: len(rows)] == rows


FILES = [(name, None) for name in TASKS if name not in LANGUAGE_TASKS or (RESULTS / f"{name}.csv").exists()] + [
    ("sentiment", n) for n in (16, 64, 256)
]


@pytest.mark.parametrize(("name", "examples"), FILES)
def test_the_files_that_there_are_hold_only_runs_that_the_table_plans(name, examples):
    """Where a run was made with a recipe, a rate or a number of steps that the table has not, it counts for nothing."""
    rows = read_rows(RESULTS / f"{compare.label(name, examples)}.csv")
    assert compare.current(rows, name, examples) == sorted(rows, key=lambda row: row["backbone"] != "pretrained") != []


@pytest.mark.parametrize("name", ["full fine-tuning", "LoRA q,v r=4"])
def test_the_same_seed_gives_the_same_bits(task, name):
    first, second = (compare.train(task, name, 1e-3, 2, seed=3, progress=False)[0] for _ in range(2))
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    moved = compare.train(task, name, 1e-3, 2, seed=4, progress=False)[0]
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), moved.parameters(), strict=True))


def test_the_entry_of_lora_plus_gives_b_its_own_rate(task):
    """After one step of AdamW every number has moved by its rate: B's four times as far as it does in plain LoRA."""
    moved = {}
    for name in ("LoRA q,v r=4", "LoRA+ q,v r=4"):
        model, _ = compare.train(task, name, 1e-3, 1, seed=3, progress=False)
        moved[name] = model.blocks[0].attention.query.B.detach().abs().median().item()
    assert moved["LoRA+ q,v r=4"] == pytest.approx(4 * moved["LoRA q,v r=4"], rel=0.05)


def test_the_random_backbone_has_the_shape_of_the_pretrained_one_and_none_of_its_weights():
    random, pretrained = (compare.model_for("qa", "full fine-tuning", 0, kind) for kind in ("random", "pretrained"))
    assert random.config == pretrained.config
    query = "blocks.0.attention.query.weight"
    assert not torch.equal(random.state_dict()[query], pretrained.state_dict()[query])
    assert torch.equal(random.state_dict()[query], Transformer(pretrained.config, seed=12345).state_dict()[query])


def test_scores_by_kind_add_up_to_the_whole(task):
    model = toy_backbone()
    kinds = {kind: task.test.kinds.count(kind) for kind in task.kinds if kind in task.test.kinds}
    scores = compare.by_kind(model, task)
    right = sum(scores[kind] * count for kind, count in kinds.items())
    assert right / len(task.test) == pytest.approx(evaluate(model, task.test)["accuracy"])


def test_models_take_turns_when_their_steps_are_timed(task):
    models = {name: compare.model_for("sentiment", name, seed=1) for name in ("full fine-tuning", "LoRA q,v r=4")}
    turns = []
    for name, model in models.items():
        own = partial(type(model).hidden, model)
        model.hidden = lambda *args, own=own, name=name, **more: turns.append(name) or own(*args, **more)
    seconds = compare.step_seconds(models, task.train.rows(slice(0, 4)).trimmed(), rounds=2)
    assert turns == ["full fine-tuning", "LoRA q,v r=4"] * 3
    assert seconds.keys() == models.keys() and all(value > 0 for value in seconds.values())


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'magic' is unknown; choose one of full fine-tuning"):
        compare.model_for("sentiment", "magic", seed=0)

"""The sweep itself: choosing rates, summing up, saying what is left to do; on runs that cost nothing."""

import dataclasses
from functools import partial

import pytest

from peft.experiments import sweep
from peft.experiments.results import COSTS, KEY, SCORES, read_rows

METHODS = {"slow": (0.1, 0.2), "fast": (0.3,)}


class Runs:
    """A study whose runs only note that they were asked for."""

    def __init__(self):
        self.done = []
        self.study = sweep.Study(
            rates=METHODS,
            planned=self.planned,
            finished=self.finished,
            step_seconds=lambda methods: {"slow": 2.0, "fast": 0.5},
        )

    def planned(self, name, stage, rate, seed):
        values = ("toy", "pretrained", name, "", "", "", stage, rate, 10 if name == "slow" else 20, seed)
        return {key: str(value) for key, value in zip(KEY, values, strict=True)}

    def finished(self, key):
        self.done.append((key["method"], key["stage"], key["learning_rate"], key["seed"]))
        scores = {"validation_loss": "1.0", "validation_accuracy": key["learning_rate"]}
        scores["test_accuracy"] = "0.5" if key["stage"] == "final" else ""
        return key | dict.fromkeys((*SCORES, *COSTS), "1") | scores


@pytest.fixture
def runs():
    return Runs()


def test_all_methods_choose_before_any_is_final_and_every_seed_runs_all_methods(runs, tmp_path):
    sweep.run(runs.study, tmp_path / "rows.csv", seeds=(1, 2))
    assert runs.done == [
        ("slow", "choice", "0.1", "0"), ("slow", "choice", "0.2", "0"), ("fast", "choice", "0.3", "0"),
        ("slow", "final", "0.2", "1"), ("fast", "final", "0.3", "1"),
        ("slow", "final", "0.2", "2"), ("fast", "final", "0.3", "2"),
    ]  # fmt: skip


def test_a_sweep_that_was_killed_goes_on_where_it_stopped(runs, tmp_path, monkeypatch):
    out, whole = tmp_path / "rows.csv", tmp_path / "whole.csv"
    sweep.run(runs.study, whole, seeds=(1, 2))
    finished, stops = runs.finished, iter([False, False, True])
    runs.done.clear()

    def killed(key):
        if next(stops):
            raise KeyboardInterrupt
        return finished(key)

    object.__setattr__(runs.study, "finished", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(runs.study, out, seeds=(1, 2))
    object.__setattr__(runs.study, "finished", finished)
    sweep.run(runs.study, out, seeds=(1, 2))
    assert len(runs.done) == 7 and out.read_bytes() == whole.read_bytes()


def test_what_is_missing_and_what_it_costs(runs, tmp_path):
    out, study = tmp_path / "rows.csv", runs.study
    everything = sweep.missing(study, [], seeds=(1, 2))
    assert len(everything) == 7
    steps = 2 * 10 + 20 + 2 * (10 + 20)
    minutes = (4 * 10 * 2.0 + 3 * 20 * 0.5) / 60
    expected = f"7 runs to do, {steps} training steps: about {minutes:.0f} minutes on this machine"
    assert sweep.cost(study, [], seeds=(1, 2)) == expected
    sweep.run(study, out, seeds=(1,))
    left = sweep.missing(study, read_rows(out), seeds=(1, 2))
    assert [(key["method"], key["stage"], key["learning_rate"], key["seed"]) for key in left] == [
        ("slow", "final", "0.2", "2"), ("fast", "final", "0.3", "2"),
    ]  # fmt: skip
    sweep.run(study, out, seeds=(1, 2))
    assert sweep.cost(study, read_rows(out), seeds=(1, 2)).startswith("nothing to do")


def test_the_best_rate_is_chosen_by_accuracy_then_by_loss():
    def row(rate, accuracy, loss, backbone="pretrained", stage="choice"):
        keys = ("method", "backbone", "stage", "learning_rate", "validation_accuracy", "validation_loss")
        return dict(zip(keys, ("m", backbone, stage, rate, accuracy, loss), strict=True))

    rows = [row("0.1", "0.8", "0.2"), row("0.2", "0.9", "0.4"), row("0.3", "0.9", "0.3")]
    rows += [row("0.4", "1.0", "0.1", backbone="random"), row("0.5", "1.0", "0.1", stage="final")]
    assert sweep.chosen_learning_rate(rows, "m", "pretrained") == 0.3
    assert sweep.chosen_learning_rate(rows, "m", "random") == 0.4
    with pytest.raises(ValueError, match=r"no learning rate was tried for 'other'.*python -m peft compare"):
        sweep.chosen_learning_rate(rows, "other", "pretrained")


def test_a_rate_is_chosen_when_the_whole_grid_was_tried_and_only_runs_with_it_count(runs, tmp_path):
    out = tmp_path / "rows.csv"
    before = sweep.run(runs.study, out, seeds=(1, 2))
    wider = dataclasses.replace(runs.study, rates={"slow": (0.1, 0.2, 0.4)})
    assert {row["stage"] for row in sweep.counted(wider, before, seeds=(1, 2))} == {"choice"}  # 0.4 was not tried
    own = sweep.run(wider, out, seeds=(1,))
    finals = [row for row in own if row["stage"] == "final"]
    assert [(row["learning_rate"], row["seed"]) for row in finals] == [("0.4", "1")]
    assert [row["learning_rate"] for row in own if row["stage"] == "choice"] == ["0.1", "0.2", "0.4"]
    narrower = dataclasses.replace(runs.study, rates={"slow": (0.1, 0.1)})  # a rate that is there twice is one
    assert {row["learning_rate"] for row in sweep.run(narrower, out, seeds=(1,))} == {"0.1"}
    assert sweep.counted(runs.study, read_rows(out), seeds=(1, 2)) == before  # nothing that was there is lost


@pytest.mark.parametrize("column", [column for column in KEY if column not in ("method", "backbone", "stage")])
@pytest.mark.parametrize("stage", ["choice", "final"])
def test_runs_that_differ_in_more_than_their_seed_or_rate_have_no_mean_and_choose_no_rate(
    runs, tmp_path, stage, column
):
    rows = sweep.run(runs.study, tmp_path / "rows.csv", seeds=(1, 2))
    row = next(row for row in rows if (row["method"], row["stage"]) == ("slow", stage))
    own = {"final": "seed", "choice": "learning_rate"}[stage]
    mixed = [*rows, row | {own: row[own] + "9"} | {column: row[column] + "9"}]
    ask = sweep.summaries if stage == "final" else partial(sweep.chosen_learning_rate, name="slow")
    if column == own:
        ask(mixed)
        mixed = [*rows, row]  # the same run twice
    with pytest.raises(ValueError, match=rf"the {stage} runs of 'slow' are .*compare\.current"):
        ask(mixed)


def test_summaries_give_mean_and_spread_over_the_seeds():
    def row(seed, accuracy, seconds):
        return {
            "method": "m", "backbone": "pretrained", "stage": "final", "seed": str(seed), "learning_rate": "0.1",
            "steps": "7", "trained_parameters": "5", "share": "0.25", "test_accuracy": accuracy,
            "seconds_per_step": seconds, "file_bytes": "2048",
        }  # fmt: skip

    (record,) = sweep.summaries([row(1, "0.8", "0.3"), row(2, "0.9", "0.1"), row(3, "1.0", "0.2")])
    assert record["mean"] == pytest.approx(0.9) and record["spread"] == pytest.approx(0.1)
    assert record["seconds_per_step"] == pytest.approx(0.2) and record["runs"] == 3
    assert sweep.summaries([row(1, "0.8", "0.3")])[0]["spread"] == 0.0
    assert sweep.summaries([row(1, "0.8", "0.3")], "random") == []
    assert "| m | 5 | 25.00% | 0.1 | 7 | 90.00% ± 10.00% (3 seeds) | 2 KiB |" in sweep.table([record])


def test_a_share_has_as_many_digits_as_it_needs():
    assert [sweep.n_seeds(*counts) for counts in ([1], [3, 3], [5, 1])] == ["1 seed", "3 seeds", "1 to 5 seeds"]
    shares = {0.5: "50.00%", 0.003404: "0.34%", 1e-4: "0.01%", 0.000034: "0.003%", 0.0: "0%"}
    assert {share: sweep.percent(share) for share in shares} == shares


def test_the_table_as_it_is_printed():
    record = {"method": "LoRA", "trained": 8192, "share": 0.0099, "learning_rate": 0.005, "steps": 600, "mean": 0.98765}
    record |= {"spread": 0.0042, "runs": 3, "file_bytes": 3 * 2**20}
    assert sweep.table([record]).splitlines() == [
        "| method | trained parameters | share | learning rate | steps | test accuracy | file |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| LoRA | 8,192 | 0.99% | 0.005 | 600 | 98.77% ± 0.42% (3 seeds) | 3,072 KiB |",
    ]

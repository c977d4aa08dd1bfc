"""A fair sweep: each method chooses its learning rate on the validation split, then runs with several seeds.

    stage "choice"    every rate of a method's grid, one seed of its own, judged on the validation split
    stage "final"     the best rate, every seed, each scored once on the test split

A comparison without a choice of learning rate for each method lies: what suits LoRA leaves a prefix where it started.

Each finished run is a row of a CSV file, and rows that are there are not run again: a sweep that was stopped goes on
where it stopped. Of several processes, which share every run, the first one writes. What a run *is* (which task, which
model) is up to `compare.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minitransformer.training.distributed import is_writer
from peft.experiments.results import KEY, Row, read_rows, write_rows

CHOICE_SEED = 0
SEEDS = (1, 2, 3, 4, 5)  # of the final runs


@dataclass(frozen=True)
class Study:
    """What a sweep has to know about its runs."""

    rates: Mapping[str, Sequence[float]]  # those to choose from, for each method
    planned: Callable[[str, str, float, int], Row]  # method, stage, rate, seed -> the columns of `KEY`, as in the file
    finished: Callable[[Row], Row]  # does a planned run, gives its whole row; only a final run may read the test split
    step_seconds: Callable[[Sequence[str]], Mapping[str, float]]  # a step of each of these methods, on this machine
    backbone: str = "pretrained"  # which rows of the file are compared

    def runs(self, stage: str, seeds: Sequence[int], rows: list[Row]) -> Iterator[Row]:
        """What identifies each run of a stage. Seeds outside, methods inside: wherever it stops, each had its turn."""
        if stage == "choice":
            for name, grid in self.rates.items():
                yield from (self.planned(name, stage, rate, CHOICE_SEED) for rate in grid)
        else:
            for seed in seeds:
                for name in self.rates:
                    yield self.planned(name, stage, chosen_learning_rate(rows, name, self.backbone), seed)


def run(study: Study, out: str | Path, seeds: Sequence[int] = SEEDS) -> list[Row]:
    """The whole sweep, or what is missing of it in the file `out`; returns all rows of the file."""
    rows = read_rows(out)
    for stage in ("choice", "final"):
        for key in study.runs(stage, seeds, rows):
            if not present(key, rows):
                rows.append(study.finished(key))
                if is_writer():
                    write_rows(out, rows)
    return rows


def missing(study: Study, rows: list[Row], seeds: Sequence[int] = SEEDS) -> list[Row]:
    """The runs that are still to be done. Of final runs, before their rate is chosen, a rate of the grid stands in."""
    choice = [key for key in study.runs("choice", seeds, rows) if not present(key, rows)]
    undecided = {key["method"] for key in choice}
    final = []
    for name, grid in study.rates.items():
        rate = grid[0] if name in undecided else chosen_learning_rate(rows, name, study.backbone)
        final += [study.planned(name, "final", rate, seed) for seed in seeds]
    return choice + [key for key in final if not present(key, rows)]


def cost(study: Study, rows: list[Row], seeds: Sequence[int] = SEEDS) -> str:
    """What the missing runs will take on this machine, as a sentence; measures a few steps of each method."""
    keys = missing(study, rows, seeds)
    if not keys:
        return "nothing to do: every run is in the file"
    seconds = study.step_seconds(list(dict.fromkeys(key["method"] for key in keys)))
    total = sum(int(key["steps"]) * seconds[key["method"]] for key in keys)
    steps = sum(int(key["steps"]) for key in keys)
    return f"{len(keys)} runs to do, {steps:,} training steps: about {total / 60:.0f} minutes on this machine"


def runs_of(rows: list[Row], name: str, backbone: str, stage: str) -> list[Row]:
    """The rows of one method on one backbone in one stage."""
    return [row for row in rows if (row["method"], row["backbone"], row["stage"]) == (name, backbone, stage)]


def present(key: Row, rows: list[Row]) -> bool:
    """Whether the file has that run already."""
    return any(all(row[column] == key[column] for column in KEY) for row in rows)


def chosen_learning_rate(rows: list[Row], name: str, backbone: str = "pretrained") -> float:
    """The rate of the best "choice" run of a method, by validation accuracy, then by validation loss.

    Raises:
        ValueError: there is no such run.
    """
    runs = runs_of(rows, name, backbone, "choice")
    if not runs:
        raise ValueError(f"no learning rate was tried for {name!r}; run the sweep first: python -m peft compare")
    best = max(runs, key=lambda row: (float(row["validation_accuracy"]), -float(row["validation_loss"])))
    return float(best["learning_rate"])


def summaries(rows: list[Row], backbone: str = "pretrained") -> list[dict]:
    """One record for each method with final runs: its rate, share, mean and spread over the seeds, time and size."""
    records = []
    for name in dict.fromkeys(row["method"] for row in rows):
        final = runs_of(rows, name, backbone, "final")
        if not final:
            continue
        accuracy = torch.tensor([float(row["test_accuracy"]) for row in final], dtype=torch.float64)
        seconds = torch.tensor([float(row["seconds_per_step"]) for row in final])
        records.append(
            {
                "method": name,
                "learning_rate": float(final[0]["learning_rate"]),
                "steps": int(final[0]["steps"]),
                "trained": int(final[0]["trained_parameters"]),
                "share": float(final[0]["share"]),
                "mean": accuracy.mean().item(),
                "spread": accuracy.std().item() if len(final) > 1 else 0.0,
                "runs": len(final),
                "seconds_per_step": seconds.median().item(),
                "file_bytes": int(final[0]["file_bytes"]),
            }
        )
    return records


def percent(share: float) -> str:
    """A share with two digits after the point, or as many as a small one needs."""
    return f"{share:.2%}" if share >= 1e-4 else f"{100 * share:.1g}%"


def n_seeds(n: int) -> str:
    """How many, in words."""
    return "1 seed" if n == 1 else f"{n} seeds"


def accuracy(record: Mapping, digits: int) -> str:
    """The mean of a record in percent, its spread, and of how many seeds; one seed has no spread."""
    spread = f" ± {record['spread']:.{digits}%}" if record["runs"] > 1 else ""
    return f"{record['mean']:.{digits}%}{spread} ({n_seeds(record['runs'])})"


def table(records: list[dict]) -> str:
    """The records as a Markdown table."""
    lines = [
        "| method | trained parameters | share | learning rate | steps | test accuracy | file |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        lines.append(
            f"| {r['method']} | {r['trained']:,} | {percent(r['share'])} | {r['learning_rate']:g} | {r['steps']} "
            f"| {accuracy(r, digits=2)} | {r['file_bytes'] / 1024:,.0f} KiB |"
        )
    return "\n".join(lines)

"""A fair sweep: each method chooses its learning rate on the validation split, then runs with several seeds.

    stage "choice"    every rate of a method's grid, one seed of its own, judged on the validation split
    stage "final"     the best rate, every seed, each scored once on the test split

A comparison without a choice of learning rate for each method lies: what suits LoRA leaves a prefix where it started.

Each finished run is a row of a CSV file, and rows that are there are not run again: a sweep that was stopped goes on
where it stopped. What counts is what the study plans as it is now; any other row of the file (another recipe, other
data, a rate or a seed that is not asked for) stays there and counts for nothing. Of several processes, which share
every run, the first one writes. What a run *is* (which task, which model) is up to `compare.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minitransformer.training.distributed import is_writer
from peft.experiments.results import KEY, Row, identity, read_rows, write_rows

CHOICE_SEED = 0
SEEDS = (1, 2, 3, 4, 5)  # of the final runs


@dataclass(frozen=True)
class Plan:
    """Which runs belong to a sweep."""

    rates: Mapping[str, Sequence[float]]  # those to choose from, for each method
    planned: Callable[[str, str, float, int], Row]  # method, stage, rate, seed -> the columns of `KEY`, as in the file

    def runs(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Row]:
        """What identifies each run, in their order. Final ones have the rate NaN until all of their grid was tried.

        Seeds outside, methods inside: wherever it stops, each had its turn.
        """
        choice: list[Row] = []
        chosen: dict[str, float] = {}
        for name, grid in self.rates.items():
            keys = [self.planned(name, "choice", rate, CHOICE_SEED) for rate in grid]
            tried = matching(rows, keys)
            chosen[name] = best_rate(tried) if len(tried) == len(set(grid)) else float("nan")
            choice += keys
        return choice + [self.planned(name, "final", rate, seed) for seed in seeds for name, rate in chosen.items()]


@dataclass(frozen=True)
class Study(Plan):
    """A plan, and how to carry it out."""

    finished: Callable[[Row], Row]  # does a planned run, gives its whole row; only a final run may read the test split
    step_seconds: Callable[[Sequence[str]], Mapping[str, float]]  # a step of each of these methods, on this machine
    scoring: Callable[[Row], float] = lambda key: 0.0  # seconds of what a planned run costs besides its steps


def matching(rows: Sequence[Row], keys: Sequence[Row]) -> list[Row]:
    """The rows of the runs that these keys identify, in the order of the rows."""
    wanted = set(map(identity, keys))
    return [row for row in rows if identity(row) in wanted]


def counted(plan: Plan, rows: Sequence[Row], seeds: Sequence[int] = SEEDS) -> list[Row]:
    """Of the rows of a file those that the plan has, as it is now."""
    return matching(rows, plan.runs(rows, seeds))


def run(study: Study, out: str | Path, seeds: Sequence[int] = SEEDS) -> list[Row]:
    """The whole sweep, or what is missing of it in the file `out`; returns the rows that count."""
    rows = read_rows(out)
    while keys := missing(study, rows, seeds):
        rows.append(study.finished(keys[0]))
        if is_writer():
            write_rows(out, rows)
    return counted(study, rows, seeds)


def missing(plan: Plan, rows: Sequence[Row], seeds: Sequence[int] = SEEDS) -> list[Row]:
    """The runs that are still to be done, those that choose a rate first."""
    done = set(map(identity, rows))
    return [key for key in plan.runs(rows, seeds) if identity(key) not in done]


def cost(study: Study, rows: Sequence[Row], seeds: Sequence[int] = SEEDS) -> str:
    """What the missing runs will take on this machine, as a sentence; measures a few steps of each method."""
    keys = missing(study, rows, seeds)
    if not keys:
        return "nothing to do: every run is in the file"
    seconds = study.step_seconds(list(dict.fromkeys(key["method"] for key in keys)))
    total = sum(int(key["steps"]) * seconds[key["method"]] + study.scoring(key) for key in keys)
    steps = sum(int(key["steps"]) for key in keys)
    return f"{len(keys)} runs to do, {steps:,} training steps: about {total / 60:.0f} minutes on this machine"


def best_rate(runs: Sequence[Row]) -> float:
    """The rate of the best run, by validation accuracy, then by validation loss."""
    best = max(runs, key=lambda row: (float(row["validation_accuracy"]), -float(row["validation_loss"])))
    return float(best["learning_rate"])


def runs_of(rows: Sequence[Row], name: str, backbone: str, stage: str) -> list[Row]:
    """The rows of one method on one backbone in one stage: alike but for their rates, or but for their seeds.

    Raises:
        ValueError: they differ in something else, so that a mean over them would say nothing.
    """
    runs = [row for row in rows if (row["method"], row["backbone"], row["stage"]) == (name, backbone, stage)]
    own = "learning_rate" if stage == "choice" else "seed"
    found = {column: {row.get(column, "") for row in runs} for column in KEY}
    mixed = [column for column in KEY if column != own and len(found[column]) > 1]
    if mixed or len(found[own]) < len(runs):
        what = f"of several kinds ({mixed[0]}: {'; '.join(sorted(found[mixed[0]]))})" if mixed else "there twice"
        raise ValueError(
            f"the {stage} runs of {name!r} are {what}; take those of the comparison as it is now: "
            f"rows = peft.experiments.compare.current(rows, task)"
        )
    return runs


def chosen_learning_rate(rows: Sequence[Row], name: str, backbone: str = "pretrained") -> float:
    """The rate of the best "choice" run of a method.

    Raises:
        ValueError: there is no such run, or they are of several kinds.
    """
    runs = runs_of(rows, name, backbone, "choice")
    if not runs:
        raise ValueError(f"no learning rate was tried for {name!r}; run the sweep first: python -m peft compare")
    return best_rate(runs)


def summaries(rows: Sequence[Row], backbone: str = "pretrained") -> list[dict]:
    """One record for each method with final runs: its rate, share, mean and spread over the seeds, time and size.

    Raises:
        ValueError: the final runs of a method are of several kinds.
    """
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
        if "steps_to_90" in final[0]:  # of a language model: of each run, None where it never came to nine in ten
            records[-1]["steps_to_90"] = [int(row["steps_to_90"]) if row["steps_to_90"] else None for row in final]
    return records


def percent(share: float) -> str:
    """A share with two digits after the point, or as many as a small one needs."""
    return f"{share:.2%}" if share >= 1e-4 else f"{100 * share:.1g}%"


def n_seeds(*counts: int) -> str:
    """How many, in words; of several results the fewest and the most."""
    least, most = min(counts), max(counts)
    return "1 seed" if most == 1 else f"{most} seeds" if least == most else f"{least} to {most} seeds"


def accuracy(record: Mapping, digits: int) -> str:
    """The mean of a record in percent, its spread, and of how many seeds; one seed has no spread."""
    spread = f" ± {record['spread']:.{digits}%}" if record["runs"] > 1 else ""
    return f"{record['mean']:.{digits}%}{spread} ({n_seeds(record['runs'])})"


def to_90(record: Mapping) -> str:
    """After how many steps the runs of a record gave nine right answers in ten: the fewest and the most."""
    reached = [steps for steps in record.get("steps_to_90", ()) if steps is not None]
    if not reached:
        return "–"
    least, most, n = min(reached), max(reached), record["runs"]
    return (f"{most}" if least == most else f"{least} to {most}") + f", {len(reached)} of {n}" * (len(reached) < n)


def table(records: list[dict]) -> str:
    """The records as a Markdown table; those of a language model have a column of `to_90`."""
    spoken = any("steps_to_90" in record for record in records)
    title, line = ("steps to 90% | ", "---:|") if spoken else ("", "")
    lines = [
        f"| method | trained parameters | share | learning rate | steps | {title}test accuracy | file |",
        f"|---|---:|---:|---:|---:|{line}---:|---:|",
    ]
    for r in records:
        lines.append(
            f"| {r['method']} | {r['trained']:,} | {percent(r['share'])} | {r['learning_rate']:g} | {r['steps']} "
            f"| {f'{to_90(r)} | ' * spoken}{accuracy(r, digits=2)} | {r['file_bytes'] / 1024:,.0f} KiB |"
        )
    return "\n".join(lines)

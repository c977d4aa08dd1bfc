"""The benchmark's figures as a table: what `tests/benchmarks/against_huggingface.py` wrote, for the README.

All jobs of both sides took turns, so the ratios are taken turn by turn: what else the machine did in the meantime fell
on all. The *limit* is what nobody can leave out. Of a training step: the same frozen model's forward pass with a
backward pass that only goes through activations, which any method must pay. Of a forward pass and of generation: norms,
the product with every weight, and attention, one after another, with nothing between them.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

# The job that is the limit of others, by how their names begin; the first that fits counts.
LIMITS = {
    "step: ": "step: limit",
    "generate: 16 rows": "generate: 16 rows, limit",
    "generate: 1 row": "generate: 1 row, limit",
    "forward: one LoRA, 64 rows": None,  # another shape than the limit's
    "forward: 64 LoRAs": None,
    "forward": "forward: limit",
}
SIDES = ("ours", "theirs")
Times = Mapping[str, Sequence[float]]  # by side, the seconds of each turn


def read(path: Path) -> dict:
    """The record of a run: "settings", "seconds" and "memory"; empty if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def ratio(times: Times) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile of ours / theirs, pair by pair; None where one side has no such job."""
    if not all(side in times for side in SIDES):
        return None
    pairs = [ours / theirs for ours, theirs in zip(*(times[side] for side in SIDES), strict=True)]
    lower, median, upper = statistics.quantiles(pairs, n=4)
    return lower, median, upper


def milliseconds(times: Times, side: str) -> str:
    """The median of one side, as a cell."""
    return f"{1e3 * statistics.median(times[side]):.1f}" if side in times else "–"


def ratio_cell(times: Times) -> str:
    """The ratio with its quartiles, as a cell."""
    quartiles = ratio(times)
    return "–" if quartiles is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles)


def memory_cells(record: Mapping, job: str) -> str:
    """The peak of a process that does nothing else, ours and theirs in MiB, and their ratio, as cells."""
    peaks = [record["memory"].get(job, {}).get(side, {}).get("peak") for side in SIDES]
    cells = ["–" if peak is None else f"{peak:.0f}" for peak in peaks]
    return " | ".join([*cells, "–" if None in peaks else f"{peaks[0] / peaks[1]:.2f}"])


def limit_cell(record: Mapping, job: str) -> str:
    """How many times its limit our job takes, the median over the turns, as a cell."""
    limit = next((limit for beginning, limit in LIMITS.items() if job.startswith(beginning)), None)
    if limit not in record["seconds"]:
        return "–"
    turns = zip(*(record["seconds"][name]["ours"] for name in (job, limit)), strict=True)
    return f"{statistics.median(ours / least for ours, least in turns):.2f}"


def table(record: Mapping) -> str:
    """All jobs of a record, as Markdown."""
    lines = [
        "| | ours, ms | theirs, ms | ours / theirs (quartiles) | of the limit | ours, MiB | theirs, MiB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for job, times in record["seconds"].items():
        cells = [milliseconds(times, side) for side in SIDES]
        cells += [ratio_cell(times), limit_cell(record, job), memory_cells(record, job)]
        lines.append(f"| {job} | {' | '.join(cells)} |")
    return "\n".join(lines)

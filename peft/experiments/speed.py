"""The benchmark's figures as a table: what `tests/benchmarks/against_huggingface.py` wrote, for the README.

Both sides of a job took turns, so the ratios are taken turn by turn: what else the machine did in the meantime fell on
both. The *limit* is what nobody can leave out. Of a training step: the same frozen model's forward pass with a
backward pass that only goes through activations, which any method must pay. Of a forward pass and of generation: norms,
the product with every weight, and attention, one after another, with nothing between them.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

# The job that is the limit of others, by how their names begin; the first that fits counts.
LIMITS = {
    "fit: LoRA q,v, one answer": None,
    "step: ": "step: limit",
    "plain loop: ": "step: limit",
    "model.loss: ": "step: limit",
    "fit: ": "step: limit",
    "generate: 16 rows": "generate: 16 rows, limit",
    "generate: 1 row": "generate: 1 row, limit",
    "forward: one LoRA, 64 rows": None,  # another shape than the limit's
    "forward: 64 LoRAs": None,
    "forward": "forward: limit",
}
SIDES = ("ours", "theirs")  # of a record that names no others
Times = Mapping[str, Sequence[float]]  # by side, the seconds of each turn


def read(path: Path) -> dict:
    """The record of a run: "settings", "seconds" and "memory"; empty if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def ratio(times: Times, sides: Sequence[str] = SIDES) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile of first / second side, pair by pair; None if one has no such job."""
    if not all(side in times for side in sides):
        return None
    pairs = [first / second for first, second in zip(*(times[side] for side in sides), strict=True)]
    lower, median, upper = statistics.quantiles(pairs, n=4)
    return lower, median, upper


def milliseconds(times: Times, side: str) -> str:
    """The median of one side, as a cell."""
    return f"{1e3 * statistics.median(times[side]):.1f}" if side in times else "–"


def ratio_cell(times: Times, sides: Sequence[str]) -> str:
    """The ratio with its quartiles, as a cell."""
    quartiles = ratio(times, sides)
    return "–" if quartiles is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles)


def memory_cells(memory: Mapping[str, Mapping], sides: Sequence[str]) -> list[str]:
    """The peak of a process that does nothing else, of both sides in MiB, and their ratio, as cells."""
    peaks = [memory.get(side, {}).get("peak") for side in sides]
    cells = ["–" if peak is None else f"{peak:.0f}" for peak in peaks]
    return [*cells, "–" if None in peaks else f"{peaks[0] / peaks[1]:.2f}"]


def limit_cell(seconds: Mapping[str, Times], job: str, side: str) -> str:
    """How many times its limit the job takes on this side, the median over the turns, as a cell."""
    limit = next((limit for beginning, limit in LIMITS.items() if job.startswith(beginning)), None)
    if limit not in seconds:
        return "–"
    turns = zip(*(seconds[name][side] for name in (job, limit)), strict=True)
    return f"{statistics.median(took / least for took, least in turns):.2f}"


def table(record: Mapping) -> str:
    """All jobs of a record, as Markdown."""
    sides, seconds = record.get("sides", SIDES), record["seconds"]
    first, second = sides
    lines = [
        f"| | {first}, ms | {second}, ms | {first} / {second} (quartiles) | of the limit "
        f"| {first}, MiB | {second}, MiB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for job, times in seconds.items():
        cells = [milliseconds(times, side) for side in sides]
        cells += [ratio_cell(times, sides), limit_cell(seconds, job, first)]
        cells += memory_cells(record["memory"].get(job, {}), sides)
        lines.append(f"| {job} | {' | '.join(cells)} |")
    return "\n".join(lines)

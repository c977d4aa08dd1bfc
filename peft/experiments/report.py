"""The README's result tables, from the result files of the comparisons.

python -m peft report              writes the tables into README.md, between its two markers
python -m peft report --check      says whether the tables there are the current ones
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft.experiments import speed
from peft.experiments.compare import COLUMNS
from peft.experiments.compare_real_text import COLUMNS as REAL_TEXT_COLUMNS
from peft.experiments.real_tasks import TASKS
from peft.experiments.results import read_rows
from peft.experiments.sweep import accuracy, percent, summaries

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results"
REAL_TEXT = "On real text (MiniLM; a trained head beside every method for the first two, no head for the quiz):"
START, END = "<!-- results: written by python -m peft report -->", "<!-- end of results -->"
SPEED_START, SPEED_END = "<!-- speed: written by python -m peft report -->", "<!-- end of speed -->"


def report(results: Path = RESULTS) -> str:
    """All tables, as Markdown: the toy tasks side by side, and those on real text whose files are there.

    Raises:
        ValueError: there is no result file of a toy task.
    """
    records = {name: summaries(read_rows(results / f"{name}.csv", REAL_TEXT_COLUMNS)) for name in TASKS}
    records = {name: own for name, own in records.items() if own}
    if not records:
        return toy_table(results)
    return "\n".join([toy_table(results), "", REAL_TEXT, "", real_text_table(records)])


def real_text_table(records: dict[str, list[dict]]) -> str:
    """The tasks on real text side by side, a row for each method, as Markdown.

    Args:
        records: for each task what `summaries` gives.
    """
    names = dict.fromkeys(record["method"] for own in records.values() for record in own)
    by_method = {name: {r["method"]: r for r in own} for name, own in records.items()}
    lines = ["| method | share | " + " | ".join(TASKS[name].title for name in records) + " |"]
    lines.append("|---|---:|" + "---:|" * len(records))
    for method in names:
        own = {task: by_method[task].get(method) for task in records}
        share = percent(next(record for record in own.values() if record)["share"])
        cells = [_accuracy(own[task]) if own[task] or method in TASKS[task].entries else "–" for task in records]
        lines.append(f"| {method} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


def toy_table(results: Path) -> str:
    """Both toy tasks side by side, a row for each method, as Markdown.

    Raises:
        ValueError: there is no result file.
    """
    tables = {}
    for task in ("sentiment", "qa"):
        rows = read_rows(results / f"{task}.csv", COLUMNS)
        if not rows:
            raise ValueError(
                f"{results / task}.csv is missing or empty; run: python -m peft compare --task {task} "
                f"--out notebooks/results"
            )
        for kind in ("pretrained", "random"):
            for record in summaries(rows, kind):
                name = record["method"] if kind == "pretrained" else f"{record['method']}, random backbone"
                tables.setdefault(name, {})[task] = record
    lines = ["| method | trained numbers | share | sentiment | question answering |", "|---|---:|---:|---:|---:|"]
    for name, records in tables.items():
        any_record = next(iter(records.values()))
        cells = [_accuracy(records.get(task)) for task in ("sentiment", "qa")]
        lines.append(f"| {name} | {any_record['trained']:,} | {percent(any_record['share'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(record: dict | None) -> str:
    return "not run" if record is None else accuracy(record, digits=1)


def speed_report(results: Path = RESULTS) -> str:
    """The table of the benchmark, and what it was made with, as Markdown.

    Raises:
        ValueError: there is no record of a run.
    """
    record = speed.read(results / "benchmark.json")
    if not record:
        raise ValueError(f"{results / 'benchmark.json'} is missing; tests/benchmarks/against_huggingface.py writes it")
    used = record["settings"]
    made_with = (
        f"{used['pairs']} pairs, {used['threads']} threads, {used['batch']} rows of {used['length']} tokens; ours: "
        f"{used['ours']}; theirs: {used['theirs']}."
    )
    return f"{speed.table(record)}\n\n{made_with}"


def written_into(text: str, table: str, start: str = START, end: str = END) -> str:
    """The README's text with the table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    if start not in text or end not in text:
        raise ValueError(f"README.md has lost its markers; put {start} and {end} round the place of the table")
    before, rest = text.split(start, 1)
    return f"{before}{start}\n{table}\n{end}{rest.split(end, 1)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m peft report", description="Write the result tables into README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the tables are not current")
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = written_into(text, report())
    new = written_into(new, speed_report(), SPEED_START, SPEED_END)
    if options.check:
        sys.exit(0 if new == text else "the table in README.md is not that of the result files: python -m peft report")
    readme.write_text(new)
    print(f"{report()}\n\n{speed_report()}")

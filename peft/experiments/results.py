"""Result files: one CSV row for each finished run, so that a sweep that was stopped goes on where it stopped."""

import csv
import io
from pathlib import Path

from minitransformer.files import write_whole

Row = dict[str, str]

NOTED = ("settings", "inputs")  # empty in rows of files that lack these columns
KEY = ("task", "backbone", "method", "recipe", *NOTED, "stage", "learning_rate", "steps", "seed")  # identify a run
SCORES = ("trained_parameters", "share", "validation_loss", "validation_accuracy", "test_accuracy")
COSTS = ("seconds_per_step", "file_bytes", "threads", "torch_version", "machine")
COLUMNS = (*KEY, *SCORES, *COSTS)  # of every file; more stand beside them where a task has kinds, or words of its own

NUMBERS = ("learning_rate", "steps", "seed")  # what has to be one, in each stage
STAGES = {
    "choice": (*NUMBERS, "validation_loss", "validation_accuracy"),
    "final": (*NUMBERS, "trained_parameters", "share", "test_accuracy", "seconds_per_step", "file_bytes"),
}


def identity(row: Row) -> tuple[str, ...]:
    """Which run a row is of."""
    return tuple(row[column] for column in KEY)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a results file; none if there is no file yet.

    Raises:
        ValueError: the file lacks columns, a row is cut off, or a run is there twice.
    """
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        text = file.read()
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not set(COLUMNS) - set(NOTED) <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} is not a results file of this command: its columns differ; choose another --out")
    found: dict[tuple[str, ...], Row] = {}
    for row in reader:
        at = f"{path}, line {reader.line_num}"
        if not is_whole(row):
            raise ValueError(f"{at}: the row is cut off or damaged; delete the line, and its run is done again")
        row = dict.fromkeys(KEY, "") | row
        if identity(row) in found:
            raise ValueError(f"{at}: the same run is there twice; delete one of the two lines")
        found[identity(row)] = row
    if not text.endswith("\n"):
        raise ValueError(f"{path}: its last line is cut off; delete the line, and its run is done again")
    return list(found.values())


def is_whole(row: dict) -> bool:
    """Whether all columns are there, and numbers where there have to be some."""
    if None in row or None in row.values() or row["stage"] not in STAGES:
        return False
    try:
        return all(float(row[column]) >= 0 for column in STAGES[row["stage"]])
    except ValueError:
        return False


def write_rows(path: str | Path, rows: list[Row]) -> None:
    """Write the file in one move, so that a sweep stopped at any moment leaves a whole one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())

"""Result files: one CSV row for each finished run, so that a sweep that was stopped goes on where it stopped."""

import csv
import io
from pathlib import Path

from minitransformer.files import write_whole

Row = dict[str, str]

KEY = ("task", "backbone", "method", "recipe", "stage", "learning_rate", "steps", "seed")  # what identifies a run
SCORES = ("trained_parameters", "share", "validation_loss", "validation_accuracy", "test_accuracy")
COSTS = ("seconds_per_step", "file_bytes", "threads", "torch_version", "machine")
COLUMNS = (*KEY, *SCORES, *COSTS)  # of every file; that of a toy task has "test_by_kind" as well


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a results file; none if there is no file yet.

    Raises:
        ValueError: the file lacks columns.
    """
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} is not a results file of this command: its columns differ; choose another --out")
        return list(reader)


def write_rows(path: str | Path, rows: list[Row]) -> None:
    """Write the file in one move, so that a sweep stopped at any moment leaves a whole one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())

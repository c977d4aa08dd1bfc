"""Result files: one CSV row for each finished run, so that a sweep that was stopped goes on where it stopped."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from minitransformer.files import write_whole

Row = dict[str, str]


def read_rows(path: str | Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a results file; none if there is no file yet.

    Raises:
        ValueError: the file has other columns.
    """
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise ValueError(f"{path} is not a results file of this command: its columns differ; choose another --out")
        return list(reader)


def write_rows(path: str | Path, rows: list[Row], columns: Sequence[str]) -> None:
    """Write the file in one move, so that a sweep stopped at any moment leaves a whole one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())

"""Result files: one CSV row for each finished run, so that a sweep that was stopped goes on where it stopped."""

import csv
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)

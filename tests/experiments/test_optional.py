"""Cells that need an optional package are passed over where it is missing, and only these."""

from types import SimpleNamespace

import pytest

from peft.experiments.optional import pass_over

MARK = "# needs the model"
CELLS = {"marked": [MARK + "\n", "model = load()\n"], "other": ["x = 1\n", MARK + "\n"], "empty": []}


def cells_after(packages):
    shell = SimpleNamespace(input_transformers_post=[])
    said = pass_over(MARK, shell, packages)
    cells = dict(CELLS)
    for transform in shell.input_transformers_post:
        cells = {name: transform(lines) for name, lines in cells.items()}
    return said, cells


def test_with_the_packages_every_cell_runs():
    said, cells = cells_after(("json", "csv"))
    assert said == "json, csv: all there, every cell runs" and cells == CELLS


def test_without_one_the_marked_cells_say_the_cure(capsys):
    said, cells = cells_after(("json", "no_such_package"))
    assert {name: lines for name, lines in cells.items() if name != "marked"} == {"other": CELLS["other"], "empty": []}
    exec("".join(cells["marked"]), {})
    assert capsys.readouterr().out == said + "\n"
    assert said.startswith("not run: no_such_package missing; install by `") and "requirements-real-text.txt" in said


def test_the_notebook_goes_on():
    """In IPython itself, where there is one."""
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactive.InteractiveShell()
    pass_over(MARK, shell, ("no_such_package",))
    assert shell.run_cell(f"{MARK}\nraise ValueError").success and shell.run_cell("y = 2").success
    assert shell.user_ns["y"] == 2

"""The notebooks as they are stored: executed from top to bottom, without an error, from the code that is in them."""

import ast
import base64
import functools
import io
import re
from pathlib import Path

import pytest
from course.stored import digest, last_state, read
from matplotlib.image import imread

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
each_notebook = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


@each_notebook
def test_outputs_come_from_the_code_that_is_stored(path):
    notebook = read(path)
    assert notebook.metadata.executed.code_sha256 == digest(notebook), (
        f"code in {path.name} was changed after it ran; python tests/course/execute.py notebooks/{path.name}"
    )


@each_notebook
def test_every_cell_ran_once_in_order_and_without_an_error(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    shown = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not [text for text in shown if not re.search(r"\d+/\d+ \[", text)]  # progress bars only, no warnings


@each_notebook
def test_it_says_what_for_whence_and_how_long_and_asserts_what_it_claims(path):
    cells = read(path).cells
    head, code = cells[0].source, "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert all(word in head for word in ("you can**", "**Before**", "**Takes**")), head
    assert "environment.check()" in code
    asserts = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 5


@each_notebook
def test_its_figures_are_opaque_so_that_a_dark_page_does_not_swallow_black_letters(path):
    outputs = [o for cell in read(path).cells for o in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures or path.stem == "11_bug_museum"
    for picture in pictures:
        corner = imread(io.BytesIO(base64.b64decode(picture)), format="png")[0, 0]
        assert corner.tolist() == [1.0] * len(corner)


def longer_functions(source: str) -> dict[str, set[str]]:
    """Every function of five statements or more, by its name: the set of its statements."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    bodies = {node.name: {ast.unparse(line) for line in node.body[1:]} for node in functions}
    return {name: lines for name, lines in bodies.items() if len(lines) >= 4}


@functools.cache
def functions_of_the_packages() -> list[set[str]]:
    files = [file for package in ("peft", "minitransformer") for file in (FOLDER.parent / package).rglob("*.py")]
    return [lines for file in files for lines in longer_functions(file.read_text()).values()]


@each_notebook
def test_it_pastes_nothing_from_the_packages(path):
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    for name, lines in longer_functions(code).items():
        assert not any(len(lines & others) > 0.6 * len(lines) for others in functions_of_the_packages()), name


def test_a_carriage_return_overwrites():
    assert last_state("a\rb\n1/3\r2/3\r3/3\r\nend") == "b\n3/3\nend"

"""Every exercise of the notebooks: stub, folded solution and plausible wrong answers, each through its checker."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from course.stored import read
from course.wrong_answers import WRONG_ANSWERS

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```.*?</details>", re.DOTALL)


@dataclass(frozen=True)
class Exercise:
    notebook: str
    check: str  # the checker's name
    imports: tuple[str, ...]  # those of the notebook so far
    stub: str  # the cell without its last line
    call: str  # the last line: the checker on the answer
    solution: str


def exercises_of(path: Path) -> list[Exercise]:
    """All cells that end in a checker, each with the solution that is folded away below it."""
    found, imports, cells = [], [], read(path).cells
    for place, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        body = ast.parse(cell.source).body
        imports += [ast.unparse(line) for line in body if isinstance(line, ast.Import | ast.ImportFrom)]
        *_, last = body
        if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and "check_" in ast.unparse(last.value.func):
            stub = "\n".join(cell.source.splitlines()[: last.lineno - 1])
            folded = SOLUTION.search(cells[place + 1].source) if place + 1 < len(cells) else None
            assert folded, f"{path.name}: the exercise before {ast.unparse(last)} has no folded solution below it"
            call = ast.unparse(last.value)
            name = ast.unparse(last.value.func)
            found.append(Exercise(path.stem, name, tuple(imports), stub, call, folded.group(1)))
    return found


EXERCISES = [exercise for path in NOTEBOOKS for exercise in exercises_of(path)]
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: f"{e.notebook}-{e.check}")


def needed(imports: tuple[str, ...], *code: str) -> list[str]:
    """Those of the imports that the code uses: a notebook has others, which take longer than all of its exercises."""
    used = {node.id for source in code for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    names = [{(a.asname or a.name).split(".")[0] for a in ast.parse(line).body[0].names} for line in imports]
    return [line for line, bound in zip(imports, names, strict=True) if bound & used]


def verdict(exercise: Exercise, *answers: str):
    """What the checker says when the answers are run after the stub."""
    space: dict = {}
    for source in (*needed(exercise.imports, exercise.stub, *answers, exercise.call), exercise.stub, *answers):
        exec(source, space)
    return eval(exercise.call, space)


@each_exercise
def test_the_stub_runs_and_is_not_solved(exercise):
    found = verdict(exercise)
    assert not found.solved and "replace the dots" in found.message, found


@each_exercise
def test_the_solution_is_right(exercise):
    found = verdict(exercise, exercise.solution)
    assert found.solved, found


@pytest.mark.parametrize(
    ("exercise", "wrong", "message"),
    [(exercise, *wrong) for exercise in EXERCISES for wrong in WRONG_ANSWERS.get(exercise.check, [])],
    ids=lambda value: f"{value.check}" if isinstance(value, Exercise) else "",
)
def test_a_wrong_answer_is_told_what_is_wrong_with_it(exercise, wrong, message):
    found = verdict(exercise, exercise.solution, wrong)
    assert not found.solved and message in found.message, found


def test_every_exercise_has_two_wrong_answers_and_every_wrong_answer_an_exercise():
    assert len({exercise.check for exercise in EXERCISES}) == len(EXERCISES)
    assert {exercise.check for exercise in EXERCISES} == set(WRONG_ANSWERS)
    assert {check: len(wrong) for check, wrong in WRONG_ANSWERS.items() if len(wrong) < 2} == {}

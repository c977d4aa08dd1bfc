"""Are the tests of `peft/functional.py` sharp? Break one thing at a time in it and see whether they notice.

    python tests/mutation_check.py

Not part of the test run (it takes some minutes). Each mutant is one change of one place: another operator, a constant
moved, a comparison turned round, the parts of a concatenation swapped, two arguments swapped, a call or a method left
out. A survivor is an equation that no test holds.
"""

import ast
import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch  # noqa: F401  imported before the forks, so that no mutant pays for it

ROOT = Path(__file__).resolve().parents[1]
TARGET, TESTS = "peft/functional.py", "tests/methods/test_functional.py"
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq}
WORDS = {"relu": "gelu"}
EQUIVALENT = {  # they compute the same: the two axes in the other order, and the axis -2 of four counted from the front
    "k.transpose(-2, -1)  ->  k.transpose(-1, -2)",
    "prefix_k.transpose(-2, -1)  ->  prefix_k.transpose(-1, -2)",
    "-2  ->  2",
}


def arithmetic(tree: ast.Module) -> list[ast.AST]:
    """Every node that computes: function bodies and defaults, without docstrings and annotations."""
    nodes = []
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for part in [*function.args.defaults, *function.body[1:]]:
            nodes += ast.walk(part)
    return nodes


def variants(node: ast.AST) -> list[ast.AST]:
    """What may stand in the place of `node` in a mutant."""
    out = []
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        out.append(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Div | ast.MatMult):
        out.append(ast.BinOp(node.right, node.op, node.left))
    if isinstance(node, ast.BinOp):
        out += [node.left, node.right]
    if isinstance(node, ast.Compare):
        out.append(ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators))
    if isinstance(node, ast.UnaryOp):
        out.append(node.operand)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            out.append(ast.Constant(not node.value))
        elif isinstance(node.value, int | float):
            out += [ast.Constant(node.value + 1), ast.Constant(node.value - 1)]
        elif node.value in WORDS:
            out.append(ast.Constant(WORDS[node.value]))
    if isinstance(node, ast.List | ast.Tuple) and len(node.elts) == 2:
        out.append(type(node)(node.elts[::-1], node.ctx))
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name):
            out.append(node.func.value)  # x.f().g() -> x.f()
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            module = node.func.value.id in ("F", "torch", "math")
            out.append(node.args[0] if module else node.func.value)  # torch.tanh(x) -> x,  k.transpose(…) -> k
        if len(node.args) >= 2:
            out.append(ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords))
        if len(node.args) == 3:
            out.append(ast.Call(node.func, node.args[:2], node.keywords))  # a bias or a mask left out
    return out


def mutants(source: str) -> list[tuple[str, str]]:
    """(what was changed, the whole mutated source), one for each variant of each node."""
    found, original = [], ast.unparse(ast.parse(source))
    for index, node in enumerate(arithmetic(ast.parse(source))):
        for number in range(len(variants(node))):
            tree = copy.deepcopy(ast.parse(source))
            place = arithmetic(tree)[index]
            new = variants(place)[number]
            what, line = f"{ast.unparse(place)}  ->  {ast.unparse(new)}", place.lineno
            Replace(place, new).visit(tree)
            text = ast.unparse(ast.fix_missing_locations(tree))
            if text != original and what not in EQUIVALENT:
                found.append((f"line {line}: {what}", text))
    return found


class Replace(ast.NodeTransformer):
    """Puts `new` in the place of `old`."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def passes(copy_of_root: Path, source: str) -> bool:
    """Whether the tests pass on this source; in a process of its own, forked so that torch is loaded already."""
    (copy_of_root / TARGET).write_text(source)
    child = os.fork()
    if child == 0:
        sys.stdout.flush()
        os.chdir(copy_of_root)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.dont_write_bytecode = True
        sys.path[0] = str(copy_of_root)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", TESTS])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> int:
    """Print every mutant and what became of it; 1 if any survived."""
    source = (ROOT / TARGET).read_text()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory) / "work"
        work.mkdir()
        shutil.copy(ROOT / "pyproject.toml", work)
        for package in ("peft", "minitransformer", "tests"):
            shutil.copytree(ROOT / package, work / package, ignore=shutil.ignore_patterns("__pycache__"))
        if not passes(work, source):
            raise SystemExit("the tests fail on the unchanged source: nothing can be learnt from mutants")
        survivors, everything = [], mutants(source)
        for what, mutated in everything:
            survived = passes(work, mutated)
            survivors += [what] * survived
            print("SURVIVED" if survived else "caught  ", what, flush=True)
    print(f"{len(everything) - len(survivors)} of {len(everything)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

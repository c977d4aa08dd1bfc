"""Are the tests of `peft` sharp? Break one thing at a time in it and see whether they notice.

    python tests/mutation_check.py                                    every equation: peft/functional.py, some minutes
    python tests/mutation_check.py peft/methods/lora.py peft/merging/merge.py         other files
    python tests/mutation_check.py --sample 20 --seed 0 peft/*/*.py   twenty mutants of each, drawn at random

Not part of the test run. Each mutant is one change of one place: another operator, a constant moved, a condition turned
round, the parts of a concatenation swapped, two arguments swapped, a call or a method left out. It runs against the
tests that `TESTS` names for its file. A survivor is something that no test holds.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch  # noqa: F401  imported before the forks, so that no mutant pays for it

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # files of tests/methods, or paths below tests
    "functional": "functional",
    "lora": "lora lora_variants counting attach_detach",
    "dora": "lora_variants invariants_of_every_method",
    "lora_plus": "lora_variants",
    "starts": "starts",
    "linear": "merging/test_merge.py lora lora_variants",
    "merge": "merging/test_merge.py lora lora_variants",
    "combine": "lora_variants merging/test_soup.py",
    "fold": "prefix_tuning",
    "prefix": "own_structure prefix_tuning attach_detach counting invariants_of_every_method",
    "real_words": "own_structure prefix_tuning prompt_tuning",
    "reparameterization": "prefix_tuning invariants_of_every_method",
    "prompt": "own_structure prompt_tuning counting invariants_of_every_method",
    "adapter": "own_structure adapters counting invariants_of_every_method",
    "bitfit": "own_structure biases_and_scales counting invariants_of_every_method",
    "ia3": "biases_and_scales counting invariants_of_every_method",
    "ln_tuning": "own_structure biases_and_scales counting invariants_of_every_method",
    "method": "own_structure attach_detach lora_variants prefix_tuning files",
    "sites": "own_structure attach_detach lora_variants prefix_tuning invariants_of_every_method",
    "attach": "attach_detach prefix_tuning files invariants_of_every_method",
    "audit": "audit",
    "counting": "counting lora_variants",
    "checkpoint": "files lora_variants",
    "contents": "files files_and_bases",
    "options": "variants lora_variants",
    "mixed": "many_tasks",
    "task_bank": "many_tasks",
    "loop": "training/test_training.py training/test_resume.py",
    "objectives": "training/test_training.py",
    "checks": "training/test_training.py",
    "plan": "training/test_training.py training/test_training_devices.py",
    "history": "training/test_training.py training/test_resume.py",
    "resume": "training/test_resume.py training/test_run_identity.py",
    "identity": "training/test_run_identity.py",
    "sweep": "experiments/test_sweep.py experiments/test_identity.py experiments/test_commands.py",
    "results": "experiments/test_results.py experiments/test_sweep.py experiments/test_identity.py",
    "doctor": "experiments/test_doctor.py",
    "exchange": "exchange",  # a folder: of every file in it
}
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", ""]  # in this process, the slow tests too
SECONDS = 240  # a mutant that takes longer, in an endless loop perhaps, counts as caught
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {ast.Is: ast.IsNot, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq, ast.In: ast.NotIn}
COMPARISONS |= {turned: kind for kind, turned in COMPARISONS.items()}
WORDS = {"relu": "gelu"}
EQUIVALENT = {  # they compute the same: the two axes in the other order, and the axis -2 of four counted from the front
    "k.transpose(-2, -1)  ->  k.transpose(-1, -2)",
    "prefix_k.transpose(-2, -1)  ->  prefix_k.transpose(-1, -2)",
    "-2  ->  2",
}


def computing(tree: ast.Module) -> list[ast.AST]:
    """Every node that computes: function bodies and defaults, without docstrings, annotations and error messages."""
    nodes = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        documented = ast.get_docstring(function) is not None
        for part in [*function.args.defaults, *function.body[documented:]]:
            nodes += below(part)
    return nodes


def below(node: ast.AST) -> list[ast.AST]:
    """The node and all nodes in it, without what is raised, annotations and functions in it."""
    if isinstance(node, ast.Raise | ast.FunctionDef):
        return []
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return []  # of zip: a second look at lengths that are equal by construction
    parts = [part for name, part in ast.iter_fields(node) if name != "annotation"]
    children = [child for part in parts for child in (part if isinstance(part, list) else [part])]
    if asks_for_a_member(node):
        children = [child for child in children if not isinstance(child, ast.Tuple)]
    return [node, *(found for child in children if isinstance(child, ast.AST) for found in below(child))]


def asks_for_a_member(node: ast.AST) -> bool:
    """Whether a tuple below it may stand in any order: `x in (a, b)`, `isinstance(x, (A, B))`."""
    if isinstance(node, ast.Compare):
        return isinstance(node.ops[0], ast.In | ast.NotIn)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"


def variants(node: ast.AST) -> list[ast.AST]:
    """What may stand in the place of `node` in a mutant."""
    out = []
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        out.append(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Div | ast.MatMult):
        out.append(ast.BinOp(node.right, node.op, node.left))
    if isinstance(node, ast.BinOp):
        out += [node.left, node.right]
    if isinstance(node, ast.If | ast.IfExp):
        turned = copy.copy(node)
        turned.test = ast.UnaryOp(ast.Not(), node.test)
        out.append(turned)
    if isinstance(node, ast.BoolOp):
        out.append(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
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
            module = node.func.value.id in ("F", "torch", "math") and bool(node.args)
            out.append(node.args[0] if module else node.func.value)  # torch.tanh(x) -> x,  k.transpose(…) -> k
        if len(node.args) >= 2:
            out.append(ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords))
        if len(node.args) == 3:
            out.append(ast.Call(node.func, node.args[:2], node.keywords))  # a bias or a mask left out
    return out


def mutants(source: str) -> list[tuple[str, str]]:
    """(what was changed, the whole mutated source), one for each variant of each node."""
    found, original = [], ast.unparse(ast.parse(source))
    for index, node in enumerate(computing(ast.parse(source))):
        for number in range(len(variants(node))):
            tree = copy.deepcopy(ast.parse(source))
            place = computing(tree)[index]
            new = variants(place)[number]
            what, line = f"{ast.unparse(place)}  ->  {ast.unparse(new)}", place.lineno
            Replace(place, new).visit(tree)
            text = ast.unparse(ast.fix_missing_locations(tree))
            if text != original and what not in EQUIVALENT:
                found.append((f"line {line}: {' '.join(what.split())[:150]}", text))
    return found


class Replace(ast.NodeTransformer):
    """Puts `new` in the place of `old`."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def key(target: str) -> str:
    """What `TESTS` calls a file: its folder if that is there, or its own name."""
    folder = Path(target).parent.name
    return folder if folder in TESTS else Path(target).stem


def tests_of(target: str) -> list[str]:
    """The paths of the tests that a file's mutants run against."""
    names = TESTS[key(target)].split()
    methods = {name: f"tests/methods/test_{name}.py" for name in names}
    return [methods[name] if (ROOT / methods[name]).is_file() else f"tests/{name}" for name in names]


def passes(copy_of_root: Path, target: str, source: str) -> bool:
    """Whether the tests pass on this source; in a process of its own, forked so that torch is loaded already."""
    (copy_of_root / target).write_text(source)
    child = os.fork()
    if child == 0:
        sys.stdout.flush()
        signal.alarm(SECONDS)
        os.chdir(copy_of_root)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.dont_write_bytecode = True
        sys.path[0] = str(copy_of_root)
        os._exit(int(pytest.main([*OPTIONS, *tests_of(target)])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def survivors_of(work: Path, target: str, sample: int | None, seed: int) -> tuple[list[str], int]:
    """What survived among the mutants of one file, and how many mutants there were; prints each."""
    source = (ROOT / target).read_text()
    if not passes(work, target, source):
        raise SystemExit(f"the tests of {target} fail on the unchanged source: nothing can be learnt from mutants")
    everything = mutants(source)
    if sample is not None and sample < len(everything):
        everything = random.Random(seed).sample(everything, sample)
    survivors = []
    for what, mutated in everything:
        survived = passes(work, target, mutated)
        survivors += [f"{target}, {what}"] * survived
        print("SURVIVED" if survived else "caught  ", f"{target}, {what}", flush=True)
    (work / target).write_text(source)
    return survivors, len(everything)


def main() -> int:
    """Print every mutant and what became of it; 1 if any survived."""
    parser = argparse.ArgumentParser(description="Break one thing at a time and see whether the tests notice.")
    parser.add_argument("files", nargs="*", default=["peft/functional.py"])
    parser.add_argument("--sample", type=int, help="so many mutants of each file, drawn at random; all of them without")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = [Path(file).resolve().relative_to(ROOT).as_posix() for file in options.files]
    targets = [file for file in files if key(file) in TESTS]
    survivors, tried = [], 0
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory) / "work"
        work.mkdir()
        shutil.copy(ROOT / "pyproject.toml", work)
        for package in ("peft", "minitransformer", "tests"):
            shutil.copytree(ROOT / package, work / package, ignore=shutil.ignore_patterns("__pycache__"))
        for target in targets:
            found, number = survivors_of(work, target, options.sample, options.seed)
            survivors, tried = survivors + found, tried + number
    print("\n".join(survivors))
    print(f"{tried - len(survivors)} of {tried} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

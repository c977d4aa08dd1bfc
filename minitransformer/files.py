"""Writing a file whole or not at all, so that a full disk or a kill leaves the old one; and knowing tensors again."""

import hashlib
import os
import uuid
from pathlib import Path

import torch
from torch import Tensor


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


def fingerprint(tensors: dict[str, Tensor], heading: str = "") -> str:
    """SHA-256 of a heading and of the names, types, shapes and bytes of some tensors."""
    digest = hashlib.sha256(heading.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

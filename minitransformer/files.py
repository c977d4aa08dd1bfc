"""Files of tensors with one JSON record: written whole or not at all, and refused when a single bit is wrong.

The file is safetensors, never pickle, since a pickle can run code. Its header holds the record, and in it a checksum of
everything.
"""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor


def write_whole(path: str | Path, data: bytes) -> None:
    """Write beside the target, force it to the disk, and rename in one move; nothing half-written ever has the name.

    A link stays one, and who may read an older file may read the new one.

    Raises:
        OSError: the file cannot be written; an older one of that name is as it was.
    """
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} is not there; make it first")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(path: str | Path, files: dict[str, bytes]) -> None:
    """Make a folder of these files beside the target, and rename it in one move; nothing half-written has the name.

    Raises:
        OSError: there is something of that name already, other than an empty folder; or a file cannot be written.
    """
    path = Path(path).resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; choose another name, or remove it first")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} is not there; make it first")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        for name, data in files.items():
            write_whole(temporary / name, data)
        if path.is_dir():  # an empty one, which not every system replaces
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def fingerprint(tensors: dict[str, Tensor], heading: str = "") -> str:
    """SHA-256 of a heading and of the names, types, shapes and bytes of some tensors."""
    digest = hashlib.sha256(heading.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def pack(tensors: dict[str, Tensor], record: dict, key: str) -> bytes:
    """The bytes of a file: the tensors, and under `key` of the header the record with its checksum.

    One key only, since safetensors writes several in no fixed order: the same contents give the same bytes.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = fingerprint(tensors, heading=json.dumps(record, sort_keys=True))
    return serialize(tensors, metadata={key: json.dumps({**record, "checksum": checksum}, sort_keys=True)})


def unpack(data: bytes, key: str) -> tuple[dict[str, Tensor], dict, bool]:
    """The tensors, the record, and whether all is sound: the bytes are the ones that `pack` writes of such contents.

    Comparing bytes covers the checksum, and also what a reader of safetensors would skip.

    Raises:
        ValueError: not a file of tensors with a record under that key, or one that is cut off.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        record = dict(json.loads(json.loads(data[8 : 8 + length])["__metadata__"][key]))
        record.pop("checksum", None)
        tensors = parse(data)
        return tensors, record, pack(tensors, record, key) == data
    except Exception as error:
        raise ValueError(f"no tensors with a record {key!r} can be read from these bytes") from error

"""The two files of a folder: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from minitransformer.files import write_folder
from minitransformer.pretrained.folder import read_json, read_tensors

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RECORD = "peft-from-scratch"  # of the metadata, where their names have no room for something


class Folder(NamedTuple):
    """What the files say."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def read_folder(folder: str | Path) -> Folder:
    """The contents of a folder; ValueError, with the cure, if it is none, or a file is absent or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the one that {CONFIG} is in")
    config = read_json(folder / CONFIG, "the adapter's config")
    if not (folder / TENSORS).is_file():
        pickle = (folder / PICKLE).exists()
        cure = f"; {PICKLE} is a pickle: load and save it in Hugging Face's peft, which writes safetensors" * pickle
        raise ValueError(f"{folder / TENSORS} is absent{cure or ', the tensors; download it with the config'}")
    return Folder(config, dict(read_tensors(folder / TENSORS)), _record(folder / TENSORS))


def write(folder: str | Path, contents: Folder) -> None:
    """Make a folder with these contents, whole or not at all; OSError if there is one of that name already."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in contents.tensors.items()}
    metadata = {"format": "pt"} | ({RECORD: json.dumps(contents.record)} if contents.record else {})
    config = json.dumps(contents.config, indent=2, sort_keys=True) + "\n"
    write_folder(folder, {CONFIG: config.encode(), TENSORS: serialize(tensors, metadata=metadata)})


def _record(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(RECORD, "{}")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{file} has metadata {RECORD!r} that cannot be read; save it again without")
    return record

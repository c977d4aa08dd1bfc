"""Files: the few tensors of a method, and enough about them to refuse the wrong model.

One safetensors file (never pickle: a pickle can run code) holds exactly the methods' tensors, and in its header one
JSON record: the format version, the recipes, a hash of the base weights they were trained on, and a checksum of
everything. The file is written whole or not at all, and it is compared byte by byte with what its contents would be
written as, so a flipped bit anywhere is noticed.
"""

from pathlib import Path

import torch
from torch import nn

from minitransformer.files import pack, write_whole
from peft.attach import Attached, attach, attached, detach, load_state_dict, state_dict
from peft.contents import FORMAT, KEY, base_hash, entries_of, read
from peft.merging.merge import is_merged, merge


def save(model: nn.Module, path: str | Path) -> None:
    """Write the attached methods to a safetensors file. An older file of that name is replaced in one move, or kept.

    Raises:
        ValueError: nothing is attached, or a tensor holds a NaN or an infinity.
        OSError: the file cannot be written; an older one is as it was.
    """
    tensors = state_dict(model)
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(f"{broken[0]} holds a NaN or an infinity, so nothing was saved; train again at a lower rate")
    record = {
        "format": FORMAT,
        "methods": [_record(entry) for entry in attached(model)],
        "base": base_hash(model),
        "merged": is_merged(model),
    }
    write_whole(path, pack(tensors, record, KEY))


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Attach what a file holds, in place. If the same recipes are attached already, only their tensors are replaced.

    A file saved while the updates were merged holds A and B all the same, and says so: they are merged again.

    Returns:
        The model itself.

    Raises:
        ValueError: not a file of ours, damaged, trained on another base, or in conflict with what is attached. The
            model is as it was then.
        FileNotFoundError: there is no such file.
    """
    tensors, record = read(path)
    entries = entries_of(path, record)
    present = attached(model)
    if present and present != entries:
        raise ValueError("other methods are attached to this model; detach(model) first, or load into a fresh model")
    try:
        if not present:
            for entry in entries:
                attach(model, entry.method, entry.seed, entry.train_also)
        if base_hash(model) != record["base"]:
            raise ValueError(
                f"{path} was trained on another base model (other weights, shape or precision); load it into the "
                f"model it was trained on"
            )
        load_state_dict(model, tensors)
        if record["merged"]:
            merge(model)
    except Exception:
        if not present and attached(model):
            detach(model)
        raise
    return model


def _record(entry: Attached) -> dict:
    return {"recipe": entry.method.as_dict(), "seed": entry.seed, "train_also": list(entry.train_also)}

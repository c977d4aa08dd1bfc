"""Files: the few tensors of a method, and enough about them to refuse the wrong model.

One safetensors file (never pickle: a pickle can run code) holds exactly the methods' tensors, and in its header one
JSON record: the format version, the recipes, a hash of the base weights they were trained on, and a checksum of
everything. The file is written whole or not at all, and it is compared byte by byte with what its contents would be
written as, so a flipped bit anywhere is noticed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minitransformer.files import fingerprint, pack, unpack, write_whole
from peft.attach import Attached, attach, attached, declared, detach, load_state_dict, state_dict
from peft.merging.merge import is_merged, merge
from peft.method import Method
from peft.sites import in_order, merged_wrappers, named_tensors

FORMAT = "peft-from-scratch 1"
KEY = "peft"  # of the record in the file's header


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
    entries = _entries(path, record)
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


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the record of a file, without a model.

    Raises:
        ValueError: not a file of ours, or damaged.
    """
    data = Path(path).read_bytes()
    try:
        tensors, record, sound = unpack(data, KEY)
    except ValueError as error:
        raise ValueError(f"{path} is not a file that peft.save wrote, or it is cut off or damaged") from error
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has another format than {FORMAT!r}; save it again with this version")
    if not sound:
        raise ValueError(f"{path} is damaged: its contents do not match its checksum; take another copy")
    return {name: tensors[name] for name in in_order(tensors)}, record


@dataclass(frozen=True)
class FileDescription:
    """What a file holds; prints as a few lines."""

    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    train_also: tuple[str, ...]
    merged: bool  # whether the updates were merged into the weights when it was saved
    base: str  # hash of the base weights it was trained on
    tensors: dict[str, tuple[int, ...]]  # name -> shape
    numbers: int
    bytes: int

    def __str__(self) -> str:
        lines = [f"{recipe}, seed {seed}" for recipe, seed in zip(self.recipes, self.seeds, strict=True)]
        if self.train_also:
            lines.append(f"with the modules {', '.join(self.train_also)}, trained whole")
        if self.merged:
            lines.append("saved while merged into the weights")
        lines.append(f"{len(self.tensors)} tensors, {self.numbers:,} numbers, {self.bytes:,} bytes")
        lines += [f"  {name} {list(shape)}" for name, shape in self.tensors.items()]
        return "\n".join([*lines, f"trained on the base {self.base[:12]}…"])


def describe(path: str | Path) -> FileDescription:
    """What a file holds, without a model: `print(describe(path))`.

    Raises:
        ValueError: not a file of ours, or damaged.
        FileNotFoundError: there is no such file.
    """
    tensors, record = read(path)
    entries = _entries(path, record)
    return FileDescription(
        recipes=tuple(str(entry.method) for entry in entries),
        seeds=tuple(entry.seed for entry in entries),
        train_also=tuple(dict.fromkeys(name for entry in entries for name in entry.train_also)),
        merged=record["merged"],
        base=record["base"],
        tensors={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        numbers=sum(tensor.numel() for tensor in tensors.values()),
        bytes=Path(path).stat().st_size,
    )


def _entries(path: str | Path, record: dict) -> list[Attached]:
    """The attached methods that a record lists, once it is known to be complete."""
    try:
        if not isinstance(record["base"], str) or not isinstance(record["merged"], bool):
            raise TypeError("base is a text, merged is true or false")
        return [
            Attached(Method.from_dict(dict(values["recipe"])), values["seed"], tuple(values["train_also"]))
            for values in record["methods"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a record that is not complete; save it again with this version") from error


def base_hash(model: nn.Module) -> str:
    """SHA-256 of every tensor that no method declares: names, types, shapes and bytes. Merging does not change it."""
    belonging = {id(tensor) for tensor in declared(model).values()}
    base = {name: p for name, p in named_tensors(model).items() if id(p) not in belonging}
    base |= {f"{site}.weight": wrapper.frozen_weight for site, wrapper in merged_wrappers(model).items()}
    return fingerprint(base)


def _record(entry: Attached) -> dict:
    return {"recipe": entry.method.as_dict(), "seed": entry.seed, "train_also": list(entry.train_also)}

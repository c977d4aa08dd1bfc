"""What a file of `peft.save` holds, without a model: read, checked, and described; and the hash of a base."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from minitransformer.files import fingerprint, unpack
from peft.attach import Attached, declared
from peft.method import Method
from peft.sites import in_order, named_tensors

FORMAT = "peft-from-scratch 1"
KEY = "peft"  # of the record in the file's header


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
    entries = entries_of(path, record)
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


def entries_of(path: str | Path, record: dict) -> list[Attached]:
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
    """SHA-256 of every tensor that no method declares: names, types, shapes and bytes."""
    belonging = {id(tensor) for tensor in declared(model).values()}
    return fingerprint({name: p for name, p in named_tensors(model).items() if id(p) not in belonging})

"""What a file of `peft.save` holds, without a model: read, checked, and described."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minitransformer.files import unpack
from peft.attach import Attached
from peft.method import Method
from peft.plain import plain
from peft.sites import in_order

FORMAT = "peft-from-scratch 2"
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
        raise ValueError(
            f"{path} has another format than {FORMAT!r}: {record.get('format')!r}, which does not say what its base "
            f"computes; where you know the base, attach the recipe to it, give load_state_dict the file's tensors "
            f"(safetensors.torch.load_file), and save again"
        )
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
    base: str  # hash of the base it was trained on
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
    """The attached methods that a record lists, once it is known to be complete and of the right types."""
    try:
        types = {name: type(value) for name, value in record.items()}
        if types != {"format": str, "methods": list, "base": str, "merged": bool} or not record["methods"]:
            raise TypeError(f"the record holds {types}")
        return [_entry(**values) for values in record["methods"]]
    except TypeError as error:
        raise ValueError(f"{path} has a record that is not complete; save it again with this version") from error


def _entry(recipe: dict, seed: int, train_also: list[str]) -> Attached:
    if type(seed) is not int or type(train_also) is not list or not all(type(name) is str for name in train_also):
        raise TypeError("a seed is a whole number, train_also a list of names")
    return Attached(plain(Method.from_dict(dict(recipe))), seed, tuple(train_also))

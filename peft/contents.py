"""What a file of `peft.save` holds, without a model: read, checked, and described; and the identity of a base."""

import inspect
import json
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from minitransformer.files import fingerprint, unpack
from peft.attach import Attached, declared
from peft.method import Method
from peft.sites import in_order, named_tensors, sites_of

FORMAT = "peft-from-scratch 2"
KEY = "peft"  # of the record in the file's header
# Settings without a part in what a model computes in evaluation; the first four are those of a TransformerConfig.
NO_PART = {"attention", "gradient_checkpointing", "init", "dropout", "implementation", "inplace", "device"}


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
            f"{path} has another format than {FORMAT!r}, which says what the base computes as well; if you know the "
            f"base, attach the recipe to it, give its tensors to load_state_dict, and save it again"
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
    merged: bool  # whether the updates were merged when it was saved
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
    beside = tuple(dict.fromkeys(name for entry in entries for name in entry.train_also))
    recipes, seeds = tuple(str(entry.method) for entry in entries), tuple(entry.seed for entry in entries)
    shapes, numbers = {name: tuple(t.shape) for name, t in tensors.items()}, sum(t.numel() for t in tensors.values())
    size = Path(path).stat().st_size
    return FileDescription(recipes, seeds, beside, record["merged"], record["base"], shapes, numbers, size)


def entries_of(path: str | Path, record: dict) -> list[Attached]:
    """The attached methods that a record lists, once it is known to be complete, and to hold nothing else."""
    try:
        types = {name: type(value) for name, value in record.items()}
        if types != {"format": str, "methods": list, "base": str, "merged": bool} or not record["methods"]:
            raise TypeError(f"the record holds {types}")
        return [_entry(**values) for values in record["methods"]]
    except TypeError as error:
        raise ValueError(f"{path} has a record that is not complete; save it again with this version") from error


def _entry(recipe: dict, seed: int, train_also: list[str]) -> Attached:
    if type(seed) is not int or not all(type(name) is str for name in train_also):
        raise TypeError("a seed is a whole number, train_also a list of names")
    return Attached(Method.from_dict({**recipe}), seed, tuple(train_also))


def base_hash(model: nn.Module) -> str:
    """SHA-256 of what computes beside the methods: of every tensor and buffer that none declares the name, type, shape
    and bytes; of every module its class, and the settings that its class gives it. Merging does not change it."""
    belonging = {id(tensor) for tensor in declared(model).values()}
    base = {name: t for name, t in named_tensors(model, buffers=True).items() if id(t) not in belonging}
    made = [(name, type(site.module).__name__, _settings(site.module)) for name, site in sites_of(model).items()]
    return fingerprint(base, heading=json.dumps(made, default=_written, skipkeys=True))


def _settings(module: nn.Module) -> dict:
    """The attributes that a class names in its `__init__`: none that a reader gave to a module later."""
    makers = [inspect.unwrap(vars(kind)["__init__"]) for kind in type(module).__mro__ if "__init__" in vars(kind)]
    names = {name for maker in makers if hasattr(maker, "__code__") for name in maker.__code__.co_names}
    return {} if isinstance(module, nn.modules.dropout._DropoutNd) else _with_a_part(vars(module), names)


def _with_a_part(values: dict, names: set[str]) -> dict:
    return {name: values[name] for name in sorted(names & values.keys() - NO_PART) if not name.startswith("_")}


def _written(value: object) -> object:
    """Of a setting that JSON does not know, what can be written down of it."""
    if isinstance(value, Tensor):
        return fingerprint({"": value})
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        own = fields(value) if isinstance(value, TransformerConfig) else ()
        unused = {field.name for field in own if field.kw_only and getattr(value, field.name) == field.default}
        return _with_a_part(vars(value), {*vars(value)} - unused)  # so a config may gain a field, and files stay valid
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return value.item() if hasattr(value, "item") else getattr(value, "__qualname__", type(value).__qualname__)

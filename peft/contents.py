"""What a file of `peft.save` holds, without a model: read, checked, and described; and the identity of a base."""

import inspect
import json
import math
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
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
NO_PART |= vars(nn.Module()).keys()


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the record of a file, without a model; ValueError if it is not one of ours, or damaged."""
    try:
        tensors, record, sound = unpack(Path(path).read_bytes(), KEY)
    except ValueError as error:
        raise ValueError(f"{path} is not a file that peft.save wrote, or it is cut off or damaged") from error
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has another format than {FORMAT!r}; attach its recipe, load_state_dict, save again")
    if not sound:
        raise ValueError(f"{path} is damaged: its contents do not match its checksum; take another copy")
    return {name: tensors[name] for name in in_order(tensors)}, record


class FileDescription:
    """What a file holds, without a model: `print(describe(path))`. ValueError if it is not one of ours, or damaged."""

    def __init__(self, path: str | Path):
        tensors, record = read(path)
        entries = entries_of(path, record)
        self.recipes, self.seeds = tuple(str(entry.method) for entry in entries), tuple(entry.seed for entry in entries)
        self.train_also = tuple(dict.fromkeys(name for entry in entries for name in entry.train_also))
        self.merged: bool = record["merged"]  # whether the updates were merged when it was saved
        self.base: str = record["base"]  # hash of the base it was trained on
        self.tensors = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.numbers, self.bytes = sum(map(math.prod, self.tensors.values())), Path(path).stat().st_size

    def __str__(self) -> str:
        lines = [f"{recipe}, seed {seed}" for recipe, seed in zip(self.recipes, self.seeds, strict=True)]
        lines += [f"with the modules {', '.join(self.train_also)}, trained whole"] * bool(self.train_also)
        lines += ["saved while merged into the weights"] * self.merged
        lines += [f"{len(self.tensors)} tensors, {self.numbers:,} parameters, {self.bytes:,} bytes"]
        lines += [f"  {name} {list(shape)}" for name, shape in self.tensors.items()]
        return "\n".join([*lines, f"trained on the base {self.base[:12]}…"])


describe = FileDescription


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
    """SHA-256 of what computes beside the methods: the name, type, shape and bytes of every tensor and buffer that no
    method declares; the class of every module, and the settings that its class gives it. Merging does not change it."""
    belonging = {id(tensor) for tensor in declared(model).values()}
    base = {name: t for name, t in named_tensors(model, buffers=True).items() if id(t) not in belonging}
    made = [(name, type(site.module).__name__, _settings(site.module)) for name, site in sites_of(model).items()]
    return fingerprint(base, heading=json.dumps(made, default=_written, skipkeys=True))


def _settings(module: nn.Module) -> dict:
    """The attributes that a class names in its `__init__`, none that a reader gave to a module later; and the buffers
    that no state dict holds. A dropout has no part in evaluation."""
    kinds = [] if isinstance(module, nn.modules.dropout._DropoutNd) else type(module).__mro__
    makers = [inspect.unwrap(vars(kind)["__init__"]) for kind in kinds if "__init__" in vars(kind)]
    names = {name for maker in makers if hasattr(maker, "__code__") for name in maker.__code__.co_names} - NO_PART
    buffers = {name: module._buffers[name] for name in sorted(module._non_persistent_buffers_set)}
    return {name: value for name, value in sorted(vars(module).items()) if name in names} | buffers


def _written(value: object) -> object:
    """Of a setting that JSON does not know, what can be written down of it."""
    if isinstance(value, Tensor):
        return None if isinstance(value, nn.Parameter) else fingerprint({"": value})  # which counts by its own name
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        own = fields(value) if isinstance(value, TransformerConfig) else ()
        unused = {field.name for field in own if field.kw_only and getattr(value, field.name) == field.default}
        # An option that is not used does not count: a config may gain a field, and files stay valid.
        return {name: part for name, part in sorted(vars(value).items()) if name not in NO_PART | unused}
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (Enum, torch.dtype)):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else getattr(value, "__qualname__", type(value).__qualname__)

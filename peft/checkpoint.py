"""Files: the few tensors of a method, and enough about them to refuse the wrong model.

One safetensors file (never pickle: a pickle can run code) holds exactly the methods' tensors, and in its header one
JSON record: the format version, the recipes, a hash of the base they were trained on, and a checksum of everything. The
file is written whole or not at all, and it is compared byte by byte with what its contents would be written as, so a
flipped bit anywhere is noticed.
"""

import inspect
import json
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minitransformer.files import fingerprint, pack, write_whole
from peft.attach import (
    Attached, attach, attached, declared, detach, load_state_dict, parts_of, record_of, set_record, state_dict,
    trainable_parameters,
)  # fmt: skip
from peft.contents import FORMAT, KEY, entries_of, read
from peft.merging.merge import is_merged, merge
from peft.sites import find, merged_wrappers, named_sites, named_tensors, sites_of

# Settings that leave what a model computes in evaluation as it is.
NO_PART_OF_THE_BASE = {
    "attention", "device", "dropout", "dtype", "gradient_checkpointing", "implementation", "init", "inplace",
}  # fmt: skip
MAKERS = (torch.arange, torch.empty, torch.full, torch.ones, torch.rand, torch.randint, torch.randn, torch.zeros)


def save(model: nn.Module, path: str | Path) -> None:
    """Write the attached methods to a safetensors file. An older file of that name is replaced in one move, or kept.

    Raises:
        ValueError: nothing is attached, a tensor holds a NaN or an infinity, or `load` could not give this model again:
            a tensor is trained that no method declares, or modules were moved since a method was attached.
        OSError: the file cannot be written; an older one is as it was.
    """
    tensors = state_dict(model)
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(f"{broken[0]} holds a NaN or an infinity, so nothing was saved; train again at a lower rate")
    for entry in attached(model):
        _require_found_again(model, entry)
    undeclared = [name for name in trainable_parameters(model) if name not in tensors]
    if undeclared:
        raise ValueError(
            f"{', '.join(undeclared[:3])} ({len(undeclared)} tensors) would be left out: trained, but declared by no "
            f"method; name the module in attach(..., train_also=...), or freeze it again if it did not change"
        )
    record = {
        "format": FORMAT,
        "methods": [_record(entry) for entry in attached(model)],
        "base": base_hash(model),
        "merged": is_merged(model),
    }
    write_whole(path, pack(tensors, record, KEY))


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Attach what a file holds, in place. If the same recipes are attached already, with whatever seed, only their
    tensors are replaced.

    A file saved while the updates were merged holds A and B all the same, and says so: they are merged again.

    Returns:
        The model itself.

    Raises:
        ValueError: not a file of ours, damaged, trained on another base, or in conflict with what is attached. The
            model is as it was then.
        FileNotFoundError: there is no such file.
    """
    tensors, record = read(path)
    entries, present = entries_of(path, record), attached(model)
    if present and [replace(entry, seed=0) for entry in present] != [replace(entry, seed=0) for entry in entries]:
        raise ValueError("other methods are attached to this model; detach(model) first, or load into a fresh model")
    before = state_dict(model) if present else {}
    try:
        if not present:
            _attach_all(model, entries, [*tensors.values(), *named_tensors(model).values()])
            before = state_dict(model)
        if base_hash(model) != record["base"]:
            raise ValueError(
                f"{path} was trained on another base model (other weights, shape, precision, or settings such as "
                f"n_heads); load it into the model it was trained on"
            )
        load_state_dict(model, tensors)
        if record["merged"]:
            merge(model)
    except BaseException:
        if before:
            load_state_dict(model, before)
        if not present and attached(model):
            detach(model)
        raise
    again = {id(old): replace(old, seed=entry.seed) for old, entry in zip(present, entries, strict=False)}
    for _, part in parts_of(model):
        set_record(part, again.get(id(record_of(part)), record_of(part)))
    return model


def base_hash(model: nn.Module) -> str:
    """SHA-256 of what computes beside the methods: of every tensor and buffer that none declares the name, type, shape
    and bytes; of every module the class and the settings that it sets when it is made. Merging does not change it."""
    belonging = {id(tensor) for tensor in declared(model).values()}
    base = {name: t for name, t in named_tensors(model, buffers=True).items() if id(t) not in belonging}
    base |= {f"{site}.weight": wrapper.frozen_weight for site, wrapper in merged_wrappers(model).items()}
    made = [(name, type(site.module).__name__, _settings(site.module)) for name, site in sites_of(model).items()]
    return fingerprint(base, heading=json.dumps(made, default=_written, skipkeys=True))


def _settings(module: nn.Module) -> dict:
    """What a module's class puts into it beside tensors and modules: no attribute that a reader gave it later."""
    makers = [inspect.unwrap(vars(kind)["__init__"]) for kind in type(module).__mro__ if "__init__" in vars(kind)]
    names = {name for maker in makers if hasattr(maker, "__code__") for name in maker.__code__.co_names}
    return {} if isinstance(module, nn.modules.dropout._DropoutNd) else _kept(vars(module), names)


def _kept(values: dict, names: set[str]) -> dict:
    ours = sorted(name for name in names & values.keys() - NO_PART_OF_THE_BASE if not name.startswith("_"))
    return {name: values[name] for name in ours}


def _written(value: object) -> object:
    """Of a setting that JSON does not know, what can be written down of it."""
    if isinstance(value, Tensor):
        return fingerprint({"": value})
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        return _kept(vars(value), {*vars(value)})
    if hasattr(value, "item"):
        return value.item()
    return sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else getattr(
        value, "__qualname__", type(value).__qualname__
    )


def _record(entry: Attached) -> dict:
    return {"recipe": entry.method.as_dict(), "seed": entry.seed, "train_also": list(entry.train_also)}


def _require_found_again(model: nn.Module, entry: Attached) -> None:
    """Raise ValueError if attaching the same again to the bare model would not lead to the same places."""
    modules = named_sites(model)
    there = {name for name, part in parts_of(model) if record_of(part) is entry and part is not modules.get(name)}
    try:
        again = set(entry.method.sites(modules))
        also = find(entry.train_also, modules, "module") if entry.train_also else []
    except ValueError:
        again, also = set(), []
    if again != there or any(record_of(modules[name]) is None for name in also):
        moved = sorted(again ^ there) or also
        raise ValueError(
            f"a file could not say where {entry.method} is: it was attached to a part of this model, or the model has "
            f"changed since ({moved[0] if moved else 'nothing'} differs); save the part it was attached to"
        )


def _attach_all(model: nn.Module, entries: list[Attached], like: list[Tensor]) -> None:
    """Attach what a file asks for, with no tensor that is longer than the longest of those."""
    try:
        with _NoLarger(max(size for tensor in like for size in tensor.shape)):
            for entry in entries:
                attach(model, entry.method, entry.seed, entry.train_also)
    except (TypeError, RuntimeError) as error:  # such as of numbers beyond 64 bits
        raise ValueError(f"the recipe asks for what cannot be made: {str(error).splitlines()[0]}") from error


class _NoLarger(TorchFunctionMode):
    """Inside, no tensor is made that is longer on any axis than `longest`: a recipe can ask for more than it holds."""

    def __init__(self, longest: int):
        super().__init__()
        self.longest = longest

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in MAKERS:
            on_meta = {name: value for name, value in kwargs.items() if name != "generator"} | {"device": "meta"}
            if max(function(*args, **on_meta).shape, default=0) > self.longest:
                raise ValueError("the recipe asks for larger tensors than the file and the model hold")
        return function(*args, **kwargs)

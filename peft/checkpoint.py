"""Files: the few tensors of a method, and enough about them to refuse the wrong model.

One safetensors file (never pickle: a pickle can run code) holds exactly the methods' tensors, and in its header one
JSON record: the format version, the recipes, a hash of the base they were trained on, and a checksum of everything. The
file is written whole or not at all, and it is compared byte by byte with what its contents would be written as, so a
flipped bit anywhere is noticed.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minitransformer.files import pack, write_whole
from minitransformer.modes import undone
from peft.attach import Attached, attach, attached, declared, detach, load_state_dict, parts_of, record_anew, state_dict
from peft.contents import FORMAT, KEY, base_hash, entries_of, read
from peft.merging.merge import is_merged, merge
from peft.method import Wrapper
from peft.sites import named, named_sites, named_tensors

MAKERS = (torch.arange, torch.empty, torch.full, torch.ones, torch.rand, torch.randint, torch.randn, torch.zeros)


def save(model: nn.Module, path: str | Path) -> None:
    """Write the attached methods to a safetensors file. An older file of that name is replaced in one move, or kept.

    Raises:
        ValueError: nothing is attached, a tensor holds a NaN or an infinity, or `load` could not give this model again:
            a tensor is trained that no method declares, or modules were moved since a method was attached.
        OSError: the file cannot be written; an older one is as it was.
    """
    tensors, entries = state_dict(model), attached(model)
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(f"{broken[0]} holds a NaN or an infinity, so nothing was saved; train again at a lower rate")
    for entry in entries:
        _require_found_again(model, entry)
    undeclared = [name for name, p in named_tensors(model).items() if p.requires_grad and name not in tensors]
    if undeclared:
        raise ValueError(
            f"{', '.join(undeclared[:3])} ({len(undeclared)} tensors) would be left out: trained, but declared by no "
            f"method; name the module in attach(..., train_also=...), or freeze it again if it did not change"
        )
    methods = [{"recipe": e.method.as_dict(), "seed": e.seed, "train_also": list(e.train_also)} for e in entries]
    record = {"format": FORMAT, "methods": methods, "base": base_hash(model), "merged": is_merged(model)}
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
    try:
        if not present:
            _attach_all(model, entries, [*tensors.values(), *named_tensors(model).values()])
        with undone(list(declared(model).values())):
            if base_hash(model) != record["base"]:
                raise ValueError(
                    f"{path} was trained on another base model (other weights, shape, precision, or settings such as "
                    f"n_heads); load it into the model it was trained on"
                )
            load_state_dict(model, tensors)
            if record["merged"]:
                merge(model)
    except BaseException:
        if not present and attached(model):
            detach(model)
        raise
    seeds = dict(zip([old.order for old in attached(model)], [entry.seed for entry in entries], strict=True))
    record_anew(model, lambda old: replace(old, seed=seeds[old.order]))
    return model


def _require_found_again(model: nn.Module, entry: Attached) -> None:
    """Raise ValueError if attaching the same again to the bare model would not lead to the same places."""
    modules = named_sites(model)
    wrapped = {name for name, part, record in parts_of(model) if record is entry and isinstance(part, Wrapper)}
    whole = {name for name, part, record in parts_of(model) if record and not isinstance(part, Wrapper)}
    try:
        moved = wrapped ^ set(entry.method.sites(modules))
        moved |= set(named(entry.train_also, modules)) - whole
    except ValueError:
        moved = wrapped | whole
    if moved:
        raise ValueError(
            f"a file could not say where {entry.method} is: it was attached to a part of this model, or the model has "
            f"changed since ({min(moved)} differs); save the part that it was attached to"
        )


def _attach_all(model: nn.Module, entries: list[Attached], like: list[Tensor]) -> None:
    """Attach what a file asks for, with no tensor that is longer than the longest of `like`."""
    try:
        with _NoLarger(max(size for tensor in like for size in tensor.shape)):
            for entry in entries:
                attach(model, entry.method, entry.seed, entry.train_also)
    except (TypeError, RuntimeError, OverflowError) as error:  # such as of numbers beyond 64 bits
        raise ValueError(f"the recipe asks for what cannot be made: {str(error).splitlines()[0]}") from error


class _NoLarger(TorchFunctionMode):
    """Inside, no tensor is made that is longer on any axis than `longest`; its shape is asked for first."""

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

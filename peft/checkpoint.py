"""Files: the few tensors of a method, and enough about them to refuse the wrong model.

One safetensors file holds exactly the methods' tensors, merged or not, and in its header one JSON record: the format
version, the recipes, a hash of the base they were trained on, and a checksum of everything. `minitransformer/files.py`
says why no flipped bit passes.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minitransformer.files import pack, write_whole
from minitransformer.modes import undone
from peft.attach import Attached, attach, attached, declared, detach, load_state_dict, parts_of, record_anew, state_dict
from peft.contents import FORMAT, KEY, base_hash, entries_of, read
from peft.merging.merge import is_merged, merge
from peft.method import Wrapper
from peft.sites import named, named_sites, named_tensors, sites_of


def save(model: nn.Module, path: str | Path) -> None:
    """Write the attached methods to a safetensors file. An older file of that name is replaced in one move, or kept,
    also with an OSError. ValueError if nothing is attached, a tensor holds a NaN or an infinity, or `load` could not
    give this model again: a tensor is trained that no method declares, or modules were moved since a method came."""
    entries = attached(model)
    for entry in entries:
        _require_found_again(model, entry)
    tensors = complete_state(model)
    methods = [{"recipe": e.method.as_dict(), "seed": e.seed, "train_also": list(e.train_also)} for e in entries]
    record = {"format": FORMAT, "methods": methods, "base": base_hash(model), "merged": is_merged(model)}
    write_whole(path, pack(tensors, record, KEY))


def complete_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of a model; ValueError if a tensor holds a NaN or an infinity, or would be left out."""
    tensors = state_dict(model)
    for name in [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"{name} holds a NaN or an infinity, so nothing was saved; train again at a lower rate")
    undeclared = [name for name, p in named_tensors(model).items() if p.requires_grad and name not in tensors]
    if undeclared:
        names = f"{', '.join(undeclared[:3])} ({len(undeclared)} tensors)"
        raise ValueError(f"{names} would be left out: trained, but of no method; name the module in train_also")
    return tensors


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Attach what a file holds, in place; returns the model. If the same recipes are attached already, with whatever
    seed, only their tensors are replaced. What was merged when it was saved is merged again. ValueError for a file that
    is not ours, damaged, of another base, or in conflict with what is attached; the model is as it was then."""
    tensors, record = read(path)
    entries, present = entries_of(path, record), attached(model)
    if present and [replace(entry, seed=0) for entry in present] != [replace(entry, seed=0) for entry in entries]:
        raise ValueError("other methods are attached to this model; detach(model) first, or load into a fresh model")
    try:
        if not present:
            with _NoLarger(max(n for t in (*tensors.values(), *named_tensors(model).values()) for n in t.shape)):
                for entry in entries:
                    attach(model, entry.method, entry.seed, entry.train_also)
        with undone(list(declared(model).values())):
            if base_hash(model) != record["base"]:
                raise ValueError(f"{path} is of another base model (weights, settings such as n_heads); load it there")
            load_state_dict(model, tensors)
            if record["merged"]:
                merge(model)
    except BaseException:
        if not present and attached(model):
            detach(model)
        raise
    record_anew(model, [replace(old, seed=new.seed) for old, new in zip(attached(model), entries, strict=True)])
    return model


def _require_found_again(model: nn.Module, entry: Attached) -> None:
    """Raise ValueError if attaching the same again to the bare model would not lead to the same places."""
    modules, parts = named_sites(model), [*parts_of(sites_of(model))]
    wrapped = {name for name, part, record in parts if record is entry and isinstance(part, Wrapper)}
    whole = {name for name, part, _ in parts if not isinstance(part, Wrapper)}
    try:
        same = wrapped == {*entry.method.sites(modules)} and {*named(entry.train_also, modules)} <= whole
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"a file could not say where {entry.method} is; save the part that it was attached to")


class _NoLarger(TorchDispatchMode):
    """Inside, no tensor longer than `longest` on any axis can be made, unless from other tensors."""

    def __init__(self, longest: int):
        super().__init__()
        self.longest = longest

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        sizes = [size for arg in args for size in (arg if isinstance(arg, list) else [arg]) if isinstance(size, int)]
        made_of_others = args and isinstance(args[0], Tensor) and not function.__name__.startswith("new_")
        if not made_of_others and max(sizes, default=0) > self.longest:
            raise ValueError("the recipe asks for larger tensors than the file and the model hold")
        return function(*args, **kwargs or {})

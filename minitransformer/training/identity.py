"""Which run it is: all that decides its result, as texts by name, equal in every process and for no other run.

A value is known by what pickle would write of it, a tensor by its bytes, and what can be called by its code and what
that refers to as well; so a lambda is known too. Three things are known by their names alone: classes, functions of
installed packages, and what holds no value, such as a logger, where code only refers to it. Lists, dicts and sets that
code refers to as globals do not count: a function may leave notes there. What no process can know again, such as a
generator that a function is given or closes over, is refused.
"""

import dis
import hashlib
import io
import pickle
import random
import sysconfig
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from minitransformer.files import fingerprint

PLAIN = (bool, int, float, str, bytes, type(None))
NAMED = (type, BuiltinFunctionType, ModuleType)
VALUES = (*PLAIN, *NAMED, tuple, Tensor, FunctionType, MethodType, partial, nn.Module)
DRAWS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def mark(value, seen: list | None = None) -> str:
    """A text by which a value is known again in another process: equal for equal values only.

    Raises:
        TypeError: something in it cannot be known.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    written = io.BytesIO()
    try:
        _Writer(written, [] if seen is None else seen).dump(value)
    except Exception as error:
        raise TypeError(f"what no other process can know again ({error})") from error
    return hashlib.sha256(written.getvalue()).hexdigest()


class _Writer(pickle._Pickler):  # the one in Python, which also asks what to make of a set
    """Writes what a value is made of, not to be read back. `seen` are functions and modules, which may form a ring."""

    def __init__(self, file: io.BytesIO, seen: list):
        super().__init__(file, protocol=4)
        self.fast = True  # equal values are written alike, whether they are one object or two
        self.seen = seen

    def reducer_override(self, value):
        if isinstance(value, DRAWS) or hasattr(value, "__next__"):
            raise TypeError(f"a {type(value).__name__}, which goes on where it was left")
        if isinstance(value, (FunctionType, nn.Module)):
            if value in self.seen:
                return tuple, (("again", self.seen.index(value)),)
            self.seen.append(value)
        parts = None if value is tuple else self._parts(value)
        return NotImplemented if parts is None else (tuple, (parts,))

    def _parts(self, value) -> tuple | None:
        if isinstance(value, Tensor):
            return ("tensor", fingerprint({"": value}))
        if isinstance(value, nn.Module):
            return (modules_of(value, self.seen), fingerprint(value.state_dict()))
        if isinstance(value, CodeType):
            return (value.co_code, value.co_names, value.co_consts)
        if isinstance(value, (set, frozenset)):
            return ("set", sorted(mark(own, self.seen) for own in value))
        if isinstance(value, FunctionType) and not value.__code__.co_filename.startswith(INSTALLED):
            names = sorted(_names(value.__code__) & value.__globals__.keys())
            referred = [(name, _mark_or_kind(value.__globals__[name], self.seen)) for name in names]
            closed_over = [cell.cell_contents for cell in value.__closure__ or ()]
            return (value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, closed_over, referred)
        if isinstance(value, (FunctionType, *NAMED)) or hasattr(value, "__wrapped__"):
            return (getattr(value, "__module__", None), value.__name__, getattr(value, "__wrapped__", None))
        if callable(value) and not isinstance(value, (MethodType, partial)):
            own = {name: part for kind in reversed(type(value).__mro__) for name, part in vars(kind).items()}
            does = [(name, own[name]) for name in sorted(own) if name == "__call__" or not name.startswith("__")]
            does = [item for item in does if isinstance(item[1], (FunctionType, *PLAIN))]
            return (type(value).__qualname__, does, value.__reduce_ex__(4)[2:])
        return None


def _names(code: CodeType) -> set[str]:
    """The globals that code reads; `co_names` would hold attributes too."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _mark_or_kind(value, seen: list, kinds: tuple = VALUES) -> str:
    """The mark of a value of these kinds or of a dataclass; of what is none, or holds none, the name of its class."""
    try:
        if isinstance(value, kinds) or is_dataclass(value):
            return mark(value, seen)
    except TypeError:
        pass
    return type(value).__qualname__


def modules_of(model: nn.Module, seen: list | None = None) -> dict[str, str]:
    """The class of every module, its attributes and its hooks, by name: the configuration, the recipes attached, …"""
    seen, found = [model] if seen is None else seen, {}
    for path, module in model.named_modules():
        found[path or "class of the model"] = type(module).__qualname__
        for name, value in vars(module).items():
            if name.startswith(("_forward", "_backward")) and value:  # hooks, by numbers that every process counts anew
                found |= _leaves(f"{path}.{name}".lstrip("."), list(value.values()), seen)
            elif not name.startswith("_") and name != "training":
                found |= _leaves(f"{path}.{name}".lstrip("."), value, seen)
    return found


def _leaves(name: str, value, seen: list) -> dict[str, str]:
    """The parts of a dataclass or a short list one by one, so that a refusal can name the one that differs."""
    parts = dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {own.name: getattr(value, own.name) for own in fields(value)}
    if not 0 < len(parts) < 30:
        return {name: _mark_or_kind(value, seen, (*VALUES, list, dict, set))}
    found = {name: type(value).__qualname__}
    for key, part in parts.items():
        found |= _leaves(f"{name}.{key}", part, seen)
    return found

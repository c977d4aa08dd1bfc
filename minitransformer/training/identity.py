"""Which run it is: all that decides its result, as texts by name, equal in every process and for no other run.

A tensor is known by its bytes, a dataclass by its fields, another object by its class and the state that pickle sees. A
function is known by its code, its defaults, what it closes over and what its code refers to; a lambda too. Three things
are known by their names alone: classes, functions of installed packages, and what holds no value, such as a logger,
where it is only referred to. Lists, dicts and sets that a function refers to as globals do not count, since it may
leave notes there. What a function is given or closes over and no process can know again, such as a generator, is refused.
"""

import hashlib
import json
import sysconfig
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType, NoneType

import torch
from torch import Tensor, nn

from minitransformer.files import fingerprint

PLAIN = (bool, int, float, complex, str, bytes, NoneType, EllipsisType, torch.dtype, torch.device)
NAMED = (type, BuiltinFunctionType, ModuleType)
CONTAINERS = (list, dict, set)
VALUES = (*PLAIN, *NAMED, tuple, frozenset, Tensor, FunctionType, MethodType, partial, nn.Module)
INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def mark(value, known: dict | None = None) -> str:
    """A text by which a value is known again in another process: equal for equal values only.

    Raises:
        TypeError: nothing of it can be known.
    """
    known = {} if known is None else known  # by id: the value, so that the id stays its own, and its text
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return fingerprint({"": value})
    if id(value) not in known:
        known[id(value)] = value, "itself"
        text = json.dumps([type(value).__qualname__, *_parts(value, known)])
        known[id(value)] = value, hashlib.sha256(text.encode()).hexdigest()
    return known[id(value)][1]


def _parts(value, known: dict) -> list[str]:
    def each(values) -> list[str]:
        return [mark(part, known) for part in values]

    if isinstance(value, NAMED):
        return [str(getattr(value, "__module__", None)), getattr(value, "__qualname__", value.__name__)]
    if isinstance(value, CodeType):
        return each([value.co_code, value.co_names, *value.co_consts])
    if isinstance(value, FunctionType) and not value.__code__.co_filename.startswith(INSTALLED):
        closed_over = [cell.cell_contents for cell in value.__closure__ or ()]
        referred = {name: value.__globals__[name] for name in sorted(_names(value.__code__) & value.__globals__.keys())}
        referred = {name: own for name, own in referred.items() if not isinstance(own, CONTAINERS)}
        given = each([value.__code__, value.__defaults__, value.__kwdefaults__, *closed_over])
        return [value.__qualname__, *given, *(f"{name} {_mark_or_kind(own, known)}" for name, own in referred.items())]
    if isinstance(value, FunctionType) or hasattr(value, "__wrapped__"):
        return [value.__module__, value.__qualname__, *each([getattr(value, "__wrapped__", None)])]
    if isinstance(value, MethodType):
        return each([value.__func__, value.__self__])
    if isinstance(value, partial):
        return each([value.func, value.args, value.keywords])
    if isinstance(value, nn.Module):
        return [json.dumps(modules_of(value, known)), fingerprint(value.state_dict())]
    if isinstance(value, dict):
        return sorted(f"{mark(key, known)} {mark(own, known)}" for key, own in value.items())
    if isinstance(value, (list, tuple)):
        return each(value)
    if isinstance(value, (set, frozenset)):
        return sorted(each(value))
    return each(_state(value))


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _state(value) -> list:
    """What pickle would keep of an object, and of one that can be called also what its class does."""
    try:
        reduced = value.__reduce_ex__(4)
    except Exception as error:
        raise TypeError(f"a {type(value).__name__}, which no other process can know again") from error
    if isinstance(reduced, str):
        return [reduced]
    own = {name: part for kind in reversed(type(value).__mro__) for name, part in vars(kind).items()}
    names = [name for name in sorted(own) if callable(value) and (name == "__call__" or not name.startswith("__"))]
    does = [(name, own[name]) for name in names if isinstance(own[name], (FunctionType, *PLAIN))]
    return [*reduced[:3], *(list(items) for items in reduced[3:5] if items is not None), *does]


def _mark_or_kind(value, known: dict) -> str:
    """The mark of a value, and of what holds none the name of its class."""
    try:
        return mark(value, known) if isinstance(value, VALUES + CONTAINERS) or is_dataclass(value) else _kind(value)
    except TypeError:
        return _kind(value)


def _kind(value) -> str:
    return type(value).__qualname__


def modules_of(model: nn.Module, known: dict | None = None) -> dict[str, str]:
    """The class of every module, its attributes and its hooks, by name: the configuration, the recipes attached, …"""
    known, found = {} if known is None else known, {}
    for path, module in model.named_modules():
        found[path or "class of the model"] = _kind(module)
        for name, value in vars(module).items():
            if name.startswith(("_forward", "_backward")) and value:  # hooks, by numbers that every process counts anew
                found |= _leaves(f"{path}.{name}".lstrip("."), list(value.values()), known)
            elif not name.startswith("_") and name != "training":
                found |= _leaves(f"{path}.{name}".lstrip("."), value, known)
    return found


def _leaves(name: str, value, known: dict) -> dict[str, str]:
    """The parts of a dataclass or a short list one by one, so that a refusal can name the one that differs."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {own.name: getattr(value, own.name) for own in fields(value)}
    elif isinstance(value, (list, tuple)) and len(value) < 10:
        parts = dict(enumerate(value))
    else:
        return {name: _mark_or_kind(value, known)}
    found = {name: _kind(value)}
    for key, part in parts.items():
        found |= _leaves(f"{name}.{key}", part, known)
    return found

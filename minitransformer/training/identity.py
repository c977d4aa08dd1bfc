"""Which run it is: all that decides its result, as texts by name, equal in every process and for no other run.

A value is known by what it is made of, down to plain values and the bytes of tensors. A function is known by its code,
what it closes over and the globals it reads, a class by its attributes; those of libraries, and of this one, by name.
What goes on where it was left, such as a generator, or cannot be written down, such as an open file, is refused.
"""

import copyreg
import dis
import hashlib
import sys
import sysconfig
from functools import cached_property
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

from torch import Tensor, nn

from minitransformer.files import fingerprint

PLAIN = (bool, int, float, str, bytes, type(None))
STREAMS = ("__next__", "getstate", "get_state", "bit_generator")  # what an iterator or a source of chance has
MADE_OF = {  # where pickle does not say it
    CellType: ("cell_contents",), CodeType: ("co_code", "co_names", "co_consts"), MethodType: ("__func__", "__self__"),
    ModuleType: ("__name__",), classmethod: ("__func__",), property: ("fget", "fset"), staticmethod: ("__func__",),
    FunctionType: ("__defaults__", "__kwdefaults__", "__closure__", "__dict__"), cached_property: ("func",),
}  # fmt: skip
LIBRARIES = {*sys.stdlib_module_names, "minitransformer", "peft"}
INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))


def leaves(name: str, value, seen: dict[int, tuple]) -> dict[str, str]:
    """What a value is made of: a text for each part, by the path to it; of more than fifty parts, one text for all.

    `seen` are objects with their names, by id; functions, classes and modules are added, which may form a ring. A part
    that goes on where it was left is a TypeError; what cannot be written down raises exceptions of its own.
    """
    if isinstance(value, PLAIN):
        return {name: _short(repr(value))}
    if id(value) in seen:
        return {name: f"as {seen[id(value)][0]}"}
    if isinstance(value, Tensor):
        return {name: fingerprint({"": value})}
    if not isinstance(value, (type, ModuleType)) and any(hasattr(value, mark) for mark in STREAMS):
        raise TypeError(f"{name} is a {type(value).__name__}, which goes on where it was left")
    kind = value if isinstance(value, (FunctionType, type)) else type(value)
    found, seen[id(value)] = {name: f"{kind.__module__}.{kind.__qualname__}"}, (name, value)
    for key, part in _parts(value).items():
        found |= leaves(f"{name}.{key}", part, seen)
    if kind is not value and not isinstance(value, nn.Module):
        del seen[id(value)]  # equal values are written alike, whether they are one object or two
    return found if len(found) <= 50 or isinstance(value, nn.Module) else {name: _short(str(found))}


def _short(text: str) -> str:
    return text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()


def _parts(value) -> dict:
    """What a value is made of, by name."""
    if type(value) in (list, tuple):
        return dict(enumerate(value))
    if type(value) is dict:
        return {key if isinstance(key, str) else repr(key): part for key, part in value.items()}
    if type(value) in (set, frozenset):
        return dict(enumerate(sorted(str(leaves("", own, {})) for own in value)))
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, type):
        does = {key: part for key, part in vars(value).items() if isinstance(part, FunctionType) or key[:2] != "__"}
        does |= {"__bases__": value.__bases__, "_abc_impl": None}  # the latter is a cache of abstract classes
        return does if _is_own(value.__module__) else {}
    if isinstance(value, nn.Module):
        return _of_module(getattr(value, "_orig_mod", value))  # compiled, it is the same model
    if type(value) in MADE_OF:
        return {key: getattr(value, key) for key in MADE_OF[type(value)]}
    made = copyreg.dispatch_table.get(type(value), lambda own: own.__reduce_ex__(4))(value)  # as pickle would write it
    if isinstance(made, str):
        return {"name": made, "wrapped": getattr(value, "__wrapped__", None)}
    maker, arguments, state, items, pairs = (*made, None, None, None)[:5]
    state = state if isinstance(state, dict) else {"state": state}
    return state | {"made by": (maker, *arguments), "its items": [*(items or ())], "its pairs": dict(pairs or ())}


def _is_own(module: str | None) -> bool:
    """Whether what that module holds is the reader's, and may change from one process to the next."""
    library = str(module).partition(".")[0]
    file = getattr(sys.modules.get(library), "__file__", None) or ""
    return library not in LIBRARIES and not file.startswith(INSTALLED)


def _of_function(value: FunctionType) -> dict:
    if hasattr(value, "__wrapped__") and value.__code__.co_filename.startswith(INSTALLED):
        return {"wrapped": value.__wrapped__}  # what a library's decorator holds may differ in each process
    parts = {key: getattr(value, key) for key in MADE_OF[FunctionType]}
    code = {"__code__": value.__code__, **_read(value.__code__, value.__globals__)} if _is_own(value.__module__) else {}
    return {key: part for key, part in parts.items() if part} | code


def _read(code: CodeType, scope: dict) -> dict:
    """What code reads of the globals, and of Python modules among them: `factor`, `settings.factor`."""
    found, last = {}, None
    for step in dis.get_instructions(code):
        held = {}
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            path, held = step.argval, scope
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(last, ModuleType):
            path, held = f"{path}.{step.argval}", vars(last)
        last = held.get(step.argval)
        if last is not None and (callable(last) or _is_own(held.get("__name__"))):  # not what a library keeps
            found[path] = last
    for inner in code.co_consts:
        found |= _read(inner, scope) if isinstance(inner, CodeType) else {}
    return found


def _of_module(value: nn.Module) -> dict:
    """Its class, hooks, attributes, tensors and modules, not what PyTorch gives to every module."""
    own, given = vars(value), {**vars(nn.Module()), "_compiled_call_impl": None}
    hooks = {key: [*own[key].values()] for key in given if key.endswith("_hooks") and own[key]}
    attributes = {key: part for key, part in own.items() if key not in given}
    return {"class": type(value)} | hooks | attributes | own["_parameters"] | own["_buffers"] | own["_modules"]

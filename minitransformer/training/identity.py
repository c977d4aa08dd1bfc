"""Which run it is: all that decides its result, as texts by name, equal in every process and for no other run.

A value is known by what it is made of, down to plain values and the bytes of tensors. A function is known by its code,
what it closes over and the globals it reads, a class by its attributes; but those of libraries, and of this one, by
their names. What no process can know again, such as a generator, is refused.
"""

import copyreg
import dis
import hashlib
import random
import sys
import sysconfig
from types import CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from minitransformer.files import fingerprint

PLAIN = (bool, int, float, str, bytes, type(None))
DRAWS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
LIBRARIES = {*sys.stdlib_module_names, "minitransformer", "peft"}
INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))


def leaves(name: str, value, seen: dict[int, tuple]) -> dict[str, str]:
    """What a value is made of: a text for each part, by the path to it; of more than fifty parts, one text for all.

    Args:
        seen: by id, the names of objects that have one, with the objects. Functions, classes and modules are added.

    Raises:
        TypeError: a part cannot be known again. Other exceptions come from objects that refuse to be written down.
    """
    if isinstance(value, PLAIN):
        return {name: _short(repr(value))}
    if id(value) in seen:
        return {name: f"as {seen[id(value)][0]}"}
    if isinstance(value, Tensor):
        return {name: fingerprint({"": value})}
    if isinstance(value, DRAWS) or (hasattr(value, "__next__") and not isinstance(value, type)):
        raise TypeError(f"{name} is a {type(value).__name__}, which goes on where it was left")
    seen[id(value)] = name, value
    kind, parts = _parts(value)
    found = {name: kind}
    for key, part in parts.items():
        found |= leaves(f"{name}.{key}", part, seen)
    if not isinstance(value, (FunctionType, type, nn.Module)):
        del seen[id(value)]  # equal values are written alike, whether they are one object or two
    return found if len(found) <= 50 or isinstance(value, nn.Module) else {name: _short(str(found))}


def mark(value) -> str:
    """One text by which a value is known again, as `leaves`."""
    return _short(str(leaves("", value, {})))


def _short(text: str) -> str:
    return text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()


def _parts(value) -> tuple[str, dict]:
    """The class of a value, or its own name, and its parts by name."""
    named = value if isinstance(value, (FunctionType, type)) else type(value)
    kind = f"{named.__module__}.{named.__qualname__}"
    if isinstance(value, ModuleType):
        return value.__name__, {}
    if isinstance(value, CodeType):
        return kind, {"does": value.co_code, "names": " ".join(value.co_names), "constants": value.co_consts}
    if isinstance(value, FunctionType):
        return kind, _of_function(value)
    if isinstance(value, type):
        return kind, _of_class(value) if _is_own(value.__module__) else {}
    if isinstance(value, MethodType):
        return kind, {"function": value.__func__, "object": value.__self__}
    if isinstance(value, nn.Module):
        return kind, _of_module(getattr(value, "_orig_mod", value))  # compiled, it is the same model
    if type(value) in (list, tuple):
        return kind, dict(enumerate(value))
    if type(value) is dict:
        return kind, {key if isinstance(key, str) else repr(key): part for key, part in value.items()}
    if type(value) in (set, frozenset):
        return kind, dict(enumerate(sorted(map(mark, value))))
    made = copyreg.dispatch_table.get(type(value), lambda own: own.__reduce_ex__(4))(value)  # as pickle would write it
    if isinstance(made, str):
        return f"{kind} {made}", {"wrapped": getattr(value, "__wrapped__", None)}
    maker, arguments, state, items, pairs = (*made, None, None, None)[:5]
    state = state if isinstance(state, dict) else {"state": state}
    return kind, {"made by": (maker, *arguments), **state, "items": [*(items or ())], "pairs": dict(pairs or ())}


def _is_own(module: str | None) -> bool:
    """Whether what that module holds is the reader's, and may change from one process to the next."""
    library = str(module).partition(".")[0]
    file = getattr(sys.modules.get(library), "__file__", None) or ""
    return library not in LIBRARIES and not file.startswith(INSTALLED)


def _of_function(value: FunctionType) -> dict:
    if hasattr(value, "__wrapped__") and value.__code__.co_filename.startswith(INSTALLED):
        return {"wrapped": value.__wrapped__}  # a decorator's own doings hold what differs in each process
    closed_over = [cell.cell_contents for cell in value.__closure__ or ()]
    given = {"defaults": value.__defaults__, "keywords": value.__kwdefaults__, "closure": closed_over, **vars(value)}
    code = {"code": value.__code__, **_read(value.__code__, value.__globals__)} if _is_own(value.__module__) else {}
    return {key: part for key, part in given.items() if part} | code


def _read(code: CodeType, scope: dict) -> dict:
    """What code reads of the globals, and of Python modules among them: `factor`, `settings.factor`, `random.random`."""
    found, held, last = {}, {}, None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            path, held = step.argval, scope
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(last, ModuleType):
            path, held = f"{path}.{step.argval}", vars(last)
        else:
            held = {}
        last = held.get(step.argval)
        if last is not None and (callable(last) or _is_own(held.get("__name__"))):  # not the state of libraries
            found[path] = last
    for inner in code.co_consts:
        found |= _read(inner, scope) if isinstance(inner, CodeType) else {}
    return found


def _of_class(value: type) -> dict:
    parts = {key: getattr(part, "__func__", getattr(part, "fget", part)) for key, part in vars(value).items()}
    does = {key: part for key, part in parts.items() if isinstance(part, FunctionType) or key[:2] not in ("__", "_a")}
    return {"bases": value.__bases__} | does


def _of_module(value: nn.Module) -> dict:
    """Its class, hooks, attributes, tensors and modules, not what PyTorch gives to every module."""
    own, given = value.__getstate__(), vars(nn.Module())
    hooks = {key: [*own[key].values()] for key in given if key.endswith("_hooks") and own[key]}
    attributes = {key: part for key, part in own.items() if key not in given}
    return {"class": type(value)} | hooks | attributes | own["_parameters"] | own["_buffers"] | own["_modules"]

"""Recipes as plain values: what a file can hold, and a recipe read from a file can be trusted to be."""

from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from peft.method import Method

PLAIN = (NoneType, bool, int, float, str)


def plain(method: Method) -> Method:
    """The recipe with plain Python values, where it was given numbers of NumPy or torch.

    Raises:
        ValueError: a value is no number, text, truth value, None, or tuple of these, or not what its field is for.
    """
    values = {f.name: _plain(getattr(method, f.name)) for f in fields(method)}
    for f in fields(method):
        if not _is(values[f.name], f.type):
            wanted = getattr(f.type, "__name__", f.type)
            raise ValueError(f"{f.name}={values[f.name]!r} cannot be kept in a file; {f.name} must be {wanted}")
    return replace(method, **values)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is plain and, as far as the annotation says it, of that type: True is no int."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is(value, option) for option in get_args(hint))
    if isinstance(value, tuple):
        inner = get_args(hint)[0] if get_origin(hint) is tuple else Any
        return hint in (Any, tuple) or get_origin(hint) is tuple and all(_is(item, inner) for item in value)
    if type(value) not in PLAIN:
        return False
    return hint not in (None, *PLAIN) or type(value) is (hint or NoneType) or (type(value) is int and hint is float)

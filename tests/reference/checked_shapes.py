"""Shapes and types checked at every call, as jaxtyping's import hook does, at a fraction of its cost.

`jaxtyping.jaxtyped` binds the signature and walks all arguments twice, for every function, whether or not it knows any
tensor; on models as small as those of the tests this takes as long as everything else. Here beartype checks arguments
and result in one pass, and only a function that names shapes opens a scope in which its axis names are bound.
"""

import functools
import inspect
from collections.abc import Callable
from typing import get_args

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation

SCOPE = jaxtyping.jaxtyped("context")  # it holds nothing itself: each `with` binds names anew


def install(*packages: str) -> None:
    """Check what is imported from these packages from here on."""
    jaxtyping.jaxtyped = _as_the_hook_calls_it
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def _as_the_hook_calls_it(*, typechecker: Callable) -> Callable:
    return checked


def checked(thing: Callable) -> Callable:
    """A function that checks its calls; a class as it is, once the one that a dataclass is built by does."""
    if inspect.isclass(thing):
        if "__dataclass_fields__" in vars(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)
        return thing
    typed, shaped = beartype(thing), any(map(_names_shapes, thing.__annotations__.values()))

    @functools.wraps(thing)
    def call(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:
            return thing(*args, **kwargs)
        try:
            if not shaped:
                return typed(*args, **kwargs)
            with SCOPE:
                return typed(*args, **kwargs)
        except BeartypeCallHintViolation as violation:
            raise jaxtyping.TypeCheckError(str(violation)) from None

    return call


def _names_shapes(annotation: object) -> bool:
    if isinstance(annotation, str):  # a forward reference: what it stands for is not known yet
        return True
    is_array = inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray)
    return is_array or any(map(_names_shapes, get_args(annotation)))

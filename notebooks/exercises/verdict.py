"""What a checker is made of: calling an answer safely, comparing what it gives, and saying what is wrong with it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a checker found; shown below the cell that ends in it."""

    solved: bool
    message: str

    def __repr__(self) -> str:
        return f"{'Right' if self.solved else 'Not yet'}: {self.message}"


class Wrong(Exception):
    """Raised inside a checker, with what is wrong; it becomes the verdict."""


def checker(check: Callable[[Any], str]) -> Callable[[Any], Verdict]:
    """Make a checker out of a function that raises `Wrong`, or returns what was shown by a right answer."""

    @functools.wraps(check)
    def verdict_on(answer) -> Verdict:
        try:
            return Verdict(True, check(answer))
        except Wrong as wrong:
            return Verdict(False, str(wrong))

    return verdict_on


def require(holds: bool, otherwise: str) -> None:
    """Raise `Wrong` unless it holds."""
    if not holds:
        raise Wrong(otherwise)


def called(answer: Callable, *arguments, **options) -> Any:
    """What the answer gives for these arguments; `Wrong` if it is not solved yet, or raises."""
    require(callable(answer), f"the checker calls your function, but was given {answer!r}; hand it over by its name")
    try:
        result = answer(*arguments, **options)
    except Exception as error:  # whatever the reader's code raises is shown as a message, not as a traceback
        shapes = "cannot be multiplied" in str(error)
        hint = " (weights are [out, in]: a row x meets the transpose, x @ W.T)" if shapes else ""
        raise Wrong(f"{_name(answer)} raised {type(error).__name__}: {error}{hint}") from None
    return given(result, f"{_name(answer)} returns nothing yet; replace the dots")


def given(value: Any, otherwise: str = "there is no answer yet; replace the dots") -> Any:
    """The value; `Wrong` if it is still the dots, or nothing."""
    require(value is not ... and value is not None, otherwise)
    return value


def _name(answer: Callable) -> str:
    return getattr(answer, "__name__", "your function")


def same(got: Any, expected: Any, hints: Mapping[str, Any] | None = None, what: str = "the result") -> None:
    """`Wrong` unless `got` is `expected`, up to rounding.

    Args:
        got: a number, an array or a tensor.
        expected: the right one.
        hints: what plausible mistakes give, by the message that explains the mistake.
        what: how the message calls what is compared.
    """
    got, expected = _array(got, what), np.asarray(expected, dtype=float)
    for hint, mistaken in (hints or {}).items():
        mistaken = np.asarray(mistaken, dtype=float)
        if got.shape == mistaken.shape and _close(got, mistaken) and not _close(mistaken, expected):
            raise Wrong(hint)
    require(got.shape == expected.shape, f"{what} has shape {list(got.shape)}, it should be {list(expected.shape)}")
    require(not np.isnan(got).any() or np.isnan(expected).any(), f"{what} holds a NaN")
    if not _close(got, expected):
        at = np.unravel_index(np.argmax(np.abs(got - expected)), got.shape)
        where = f" at {list(map(int, at))}" if got.ndim else ""
        raise Wrong(f"{what} is {got[at]:.6g}{where}, it should be {expected[at]:.6g}")


def _array(value: Any, what: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    try:
        return np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise Wrong(f"{what} should be a number or a tensor, it is {value!r}") from None


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return bool(one.ndim == 0 and other.ndim == 0)
    return bool(np.allclose(one, other, rtol=1e-5, atol=1e-7))

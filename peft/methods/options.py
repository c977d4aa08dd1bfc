"""What the options of a recipe may be: types with a limit, outside of which `Method` raises ValueError."""

from collections.abc import Callable
from typing import Annotated, Any


def limited(kind: Any, allowed: Callable[..., bool], message: str) -> Any:
    """The type, of whose values only some are allowed; the message may say {name} and {value}."""

    def check(name: str, value) -> None:
        if not allowed(value):
            raise ValueError(message.format(name=name, value=value))

    return Annotated[kind, check]


def one_of(*names: str) -> Any:
    """One of these names."""
    choices = ", ".join(names) if len(names) > 2 else " or ".join(f'"{name}"' for name in names)
    return limited(str, names.__contains__, f"{{name}}={{value!r}} is unknown; choose one of {choices}")


def some_of(*names: str) -> Any:
    """One or more of these names, each once."""
    message = f"{{name}}={{value}} must name one or more of {', '.join(names)}, each once"
    return limited(tuple[str, ...], lambda given: 0 < len(given) == len({*given} & {*names}), message)


Count = limited(int, lambda n: n >= 1, "{name} must be at least 1, got {value}")
Factor = limited(float | int, bool, "{name} must be another number than 0, with which nothing could be learned")
Probability = limited(float | int, lambda p: 0 <= p < 1, "{name} is a probability in [0, 1), got {value}")
Deviation = limited(float | int, lambda s: s >= 0, "{name} is a standard deviation, 0 or more, got {value}")
Names = limited(tuple[str, ...], lambda names: len({*names}) == len(names), "{name}={value} must name each once")

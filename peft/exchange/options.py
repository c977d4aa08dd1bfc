"""adapter_config.json, option by option: what we do not compute must have the value that makes no difference."""

from typing import Any

# Where a folder comes from, and how the frozen weights lie: without a part in what is computed.
ORIGIN: dict[str, type] = {
    "peft_version": str,
    "base_model_name_or_path": str,
    "revision": str,
    "auto_mapping": dict,
    "inference_mode": bool,
    "fan_in_fan_out": bool,
}


class Options:
    """The options of one folder. Each method reads those that it knows, and then, before it looks at tensors, calls
    `finish`, which refuses what nobody has read.

    Raises:
        ValueError: in each method, an option of another type or value than there can be.
    """

    def __init__(self, values: dict[str, Any]):
        self.values, self.known = values, {"peft_type"}
        self.unused(ORIGIN)

    def get(self, name: str, default: Any = None) -> Any:
        self.known.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        return as_count(name, self.get(name, default))

    def number(self, name: str, default: float | int) -> float | int:
        self.known.add(name)
        return as_number(name, self.values.get(name, default))  # null is no number, and no default

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if type(value) is not bool:
            raise ValueError(f"adapter_config.json has {name}={value!r}, where true or false is needed")
        return value

    def names(self, name: str) -> list[str]:
        """A list of names; empty where the option is left out."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            raise ValueError(
                f"adapter_config.json has {name}={value!r}, where a list of modules' names is needed; write the names "
                f"out, which the tensors' names tell"
            )
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Raise ValueError unless the option has one of these values, or is left out."""
        value = self.get(name, allowed[0])
        if not any(type(value) is type(other) and value == other for other in allowed):
            listed = " or ".join(repr(other) for other in allowed)
            raise ValueError(
                f"adapter_config.json has {name}={value!r}, but only {listed} is supported; choose such a folder"
            )

    def unused(self, kinds: dict[str, type]) -> None:
        """These have no part in what is computed, of whatever value of their type."""
        for name, kind in kinds.items():
            value = self.get(name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"adapter_config.json has {name}={value!r}, which is no {kind.__name__}; correct it")

    def finish(self) -> None:
        """Raise ValueError for an option that nobody has read, unless it is off: null or false. An empty object is on:
        it asks for a variant with its defaults."""
        for name, value in self.values.items():
            if name not in self.known and value is not None and value is not False:
                raise ValueError(
                    f"adapter_config.json has {name}={value!r}, which is not supported; choose a folder without it"
                )


def as_count(name: str, value: Any) -> int:
    """The value; ValueError unless it is a whole number from 1."""
    if type(value) is not int or not 1 <= value < 2**30:
        raise ValueError(f"adapter_config.json says {name}={value!r}, where a whole number from 1 is needed")
    return value


def as_number(name: str, value: Any) -> float | int:
    """The value; ValueError unless it is a finite number."""
    if type(value) not in (int, float) or not abs(value) < 2**63:  # of a NaN neither is true
        raise ValueError(f"adapter_config.json says {name}={value!r}, where a finite number is needed")
    return value

"""What a folder holds, in our terms, and what all methods on linear layers share in reading and writing one."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft.exchange.names import Names, ends_in, short
from peft.exchange.options import Options
from peft.method import Method

FRONT = "base_model.model."  # of their tensors' names, of methods that wrap modules
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Found(NamedTuple):
    """What a folder says: the recipes to attach, and their tensors by our names."""

    recipes: list[Method]
    tensors: dict[str, Tensor]


class Written(NamedTuple):
    """What a folder is to say: the options of the method, and the tensors by their names."""

    options: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any]  # what their names have no room for, for our reader alone


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for a tensor that is not of floating-point numbers, all finite."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is of {tensor.dtype}, where float16, bfloat16, float32 or float64 is needed")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds a NaN or an infinity; take a folder from before the training went wrong")


def check_shape(name: str, tensor: Tensor, *expected: int) -> None:
    """Raise ValueError unless the tensor has that shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but config and model say {list(expected)}; load it into the model "
            f"that it was trained on"
        )


def by_module(
    tensors: dict[str, Tensor], names: Names, options: Options, endings: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """Their module -> ending -> tensor: every targeted module with every ending, and no other.

    Raises:
        ValueError: a name of something else, or a tensor that is missing.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in endings if name.endswith(f".{ending}")), "")
        module = name.removeprefix(FRONT).removesuffix(f".{ending}")
        if not name.startswith(FRONT) or not ending or module not in names.modules:
            raise ValueError(
                f"{name!r} has no place in this model, which knows {', '.join(endings)} of {_example(names)} and its "
                f"like; load the folder into the model that it was trained on"
            )
        found.setdefault(module, {})[ending] = tensor
    for module in _targeted(names, options):
        for ending in endings:
            if ending not in found.get(module, {}):
                raise ValueError(f"the folder lacks {FRONT}{module}.{ending}, which its config asks for; get it again")
    return found


def _example(names: Names) -> str:
    return next(iter(names.modules))


def _targeted(names: Names, options: Options) -> list[str]:
    """Those of their linear layers that the options name, in the order of the model; ValueError if there is none."""
    targets, excluded = options.names("target_modules"), options.names("exclude_modules")
    layers = options.get("layers_to_transform")
    options.only("layers_pattern", [], "layers", "layer", "h", ["layers"], ["layer"], ["h"])
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise ValueError(f"adapter_config.json has layers_to_transform={layers!r}, where whole numbers are needed")
    found = [name for name in names.modules if ends_in(name, targets) and not ends_in(name, excluded)]
    if layers:
        found = [name for name in found if name in targets or _layer(name) in layers]
    if not found:
        raise ValueError(f"target_modules={targets} names no layer of this model, which has {_example(names)}")
    return found


def _layer(name: str) -> int | None:
    """The number of the layer in which a module of theirs is."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def require_targeted(modules: Iterable[str], names: Names, options: Options) -> None:
    """Raise ValueError for a module with tensors that the config does not name."""
    targeted = {*_targeted(names, options)}
    for module in modules:
        if module not in targeted:
            raise ValueError(
                f"the folder has tensors of {module}, which target_modules={options.names('target_modules')} does not "
                f"name; add it there if it is meant"
            )


def entering(sites: Iterable[str], names: Names) -> list[tuple[tuple[str, ...], tuple[int, ...] | None]]:
    """The `targets` and `layers` of recipes that together enter exactly these linear layers of ours."""
    in_block: dict[int | None, list[str]] = {}
    for site in sites:
        inner = site.removeprefix(names.root)
        parts = inner.split(".")
        if parts[0] == "blocks":
            in_block.setdefault(int(parts[1]), []).append(parts[-1])
        else:
            in_block.setdefault(None, []).append(inner)
    together: dict[tuple[str, ...], list[int | None]] = {}
    for block, targets in in_block.items():
        together.setdefault(tuple(targets), []).append(block)
    everywhere = list(range(names.config.n_layers))
    return [
        (targets, None if blocks in ([None], everywhere) else tuple(blocks)) for targets, blocks in together.items()
    ]


def targets_of(modules: Iterable[str], names: Names) -> list[str]:
    """What `target_modules` says for exactly these of their modules."""
    modules = [*modules]
    return short(modules, [name for name in (*names.modules, *names.others) if name not in modules])


def patterned(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest of the values that modules of theirs have, and a pattern for those that have another."""
    common, _ = Counter(values.values()).most_common(1)[0]
    pattern = {}
    for value in dict.fromkeys(values.values()):
        if value != common:
            own = [module for module in values if values[module] == value]
            pattern |= dict.fromkeys(short(own, [module for module in values if module not in own]), value)
    return common, pattern


def whole(number: float) -> float:
    """3 for 3.0, as their files have it."""
    return int(number) if number == int(number) else number

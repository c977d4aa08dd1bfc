"""Which linear layers a folder is about: by its tensors' names, by `target_modules`, and by our recipes' targets.

The tensors' names tell it all; `target_modules` must say the same, or the folder is not whole.
"""

import re
from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import Any

from torch import Tensor

from peft.exchange.contents import FRONT
from peft.exchange.names import Names, ends_in, short
from peft.exchange.options import Options


def by_module(
    tensors: dict[str, Tensor], names: Names, options: Options, endings: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """Their module -> ending -> tensor, in the model's order: every targeted module with every ending, and no other.

    Raises:
        ValueError: an option that nobody has read; a name of something else, a tensor that is missing, or one that
            `target_modules` does not ask for.
    """
    targeted, found = _targeted(names, options), {}
    options.finish()
    for name, tensor in tensors.items():
        ending = next((ending for ending in endings if name.endswith(f".{ending}")), "")
        module = name.removeprefix(FRONT).removesuffix(f".{ending}")
        if not name.startswith(FRONT) or not ending or module not in names.modules:
            example = next(iter(names.modules))
            raise ValueError(
                f"{name!r} has no place in this model, which knows {', '.join(endings)} of {example} and its like; "
                f"load the folder into the model that it was trained on, or train one that enters these layers alone"
            )
        found.setdefault(module, {})[ending] = tensor
    if not targeted:
        raise ValueError(
            f"target_modules={options.names('target_modules')} asks for no layer of this model, which has "
            f"{', '.join(names.modules)}"[:400]
        )
    for module in targeted:
        if absent := [ending for ending in endings if ending not in found.get(module, {})]:
            raise ValueError(f"the folder lacks {FRONT}{module}.{absent[0]}, which its config asks for; get it again")
    if more := [module for module in found if module not in targeted]:
        raise ValueError(
            f"the folder has tensors of {more[0]}, which target_modules={options.names('target_modules')} does not "
            f"ask for; correct target_modules if they are meant"
        )
    return {module: found[module] for module in targeted}


def _targeted(names: Names, options: Options) -> list[str]:
    """Those of their linear layers that the options name, in the model's order, as their library does."""
    targets, excluded = options.names("target_modules"), options.names("exclude_modules")
    layers, patterns = options.get("layers_to_transform", []), options.get("layers_pattern", [])
    layers = [layers] if type(layers) is int else layers
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"adapter_config.json has layers_to_transform={layers!r}, where whole numbers are needed")
    if patterns and not layers:
        raise ValueError("adapter_config.json has layers_pattern without layers_to_transform; take it out")
    if not isinstance(patterns, list):
        raise ValueError(f"adapter_config.json has layers_pattern={patterns!r}, where a list of names is needed")
    found = [name for name in names.modules if ends_in(name, targets) and not ends_in(name, excluded)]
    return [name for name in found if not layers or name in targets or _layer(name, patterns) in layers]


def _layer(name: str, patterns: list[str]) -> int | None:
    """The number in a module's name: the first one, or the first behind one of the patterns."""
    pairs = [(before, int(part)) for before, part in pairwise(name.split(".")) if part.isdecimal()]
    return next((number for before, number in pairs if not patterns or before in patterns), None)


def entering(sites: Collection[str], names: Names) -> list[tuple[tuple[str, ...], tuple[int, ...] | None]]:
    """The `targets` and `layers` of recipes that together enter exactly these linear layers of ours."""
    in_block: dict[int | None, list[str]] = {}
    for site in [site for site in names.places if site in sites]:
        inner = site.removeprefix(names.root)
        _, *block, last = inner.split(".") if inner.startswith("blocks.") else ("", inner)
        in_block.setdefault(int(block[0]) if block else None, []).append(last)
    together: dict[tuple[str, ...], list[int | None]] = {}
    for block, targets in in_block.items():
        together.setdefault(tuple(targets), []).append(block)
    everywhere = [[None], [*range(names.config.n_layers)]]
    return [(targets, None if blocks in everywhere else tuple(blocks)) for targets, blocks in together.items()]


def targets_of(modules: Collection[str], names: Names) -> list[str]:
    """What `target_modules` says for exactly these of their modules."""
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


def check_pattern(pattern: dict[str, Any], modules: Collection[str]) -> None:
    """Raise ValueError for a name in a pattern that is none of these modules, nor the end of one."""
    for key in pattern:
        if not any(_matches(key, module) for module in modules):
            raise ValueError(f"a pattern in adapter_config.json names {key!r}, and the folder has no such module")


def matched(pattern: dict[str, Any], module: str, common: Any) -> Any:
    """The value for a module: of a name that is its own or its end by whole parts. Of several names the first counts
    in their library, but their files are sorted, so ValueError if the values differ."""
    found = [value for key, value in pattern.items() if _matches(key, module)] or [common]
    if any(value != found[0] for value in found):
        raise ValueError(f"patterns in adapter_config.json give {module} the values {found}; leave the one that holds")
    return found[0]


def _matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


def read_pattern(options: Options, name: str) -> dict[str, Any]:
    """Names of modules, or their ends, with what holds for them; ValueError for an expression that is no plain name."""
    pattern = options.get(name, {})
    if not isinstance(pattern, dict) or not all(re.fullmatch(r"\^?[\w.]+", key) for key in pattern):
        raise ValueError(
            f"adapter_config.json has {name}={pattern!r}, where plain names of modules are needed; write the names out"
        )
    return pattern

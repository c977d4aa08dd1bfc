"""Sites: where in a model a method can enter, and how wrappers are put in and taken out.

A module keeps its name whatever is wrapped round it: `blocks.0.attention.query` is the query map of the first block,
also when it lies in `blocks.0.attention.base.query.base`. These names are the keys of `peft.state_dict`.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from minitransformer.block import Block
from minitransformer.config import TransformerConfig
from peft.method import Wrapper


class Site(NamedTuple):
    """A place in a model: the frozen module, the wrappers round it from the outside in, and what holds them."""

    module: nn.Module
    wrappers: list[Wrapper]
    parent: nn.Module | None  # None: the model itself
    attribute: str


def sites_of(model: nn.Module) -> dict[str, Site]:
    """Every site of the model by its name, the model itself ("") first; wrappers are looked through."""
    found, stack = {}, [("", Site(model, [], None, ""))]
    while stack:
        name, site = stack.pop()
        found[name] = site
        for attribute, child in reversed(list(site.module.named_children())):
            wrappers = []
            while isinstance(child, Wrapper):
                wrappers.append(child)
                child = child.base
            below = f"{name}.{attribute}" if name else attribute
            stack.append((below, Site(child, wrappers, site.module, attribute)))
    return found


def named_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Every frozen module below `model` by its name."""
    return {name: site.module for name, site in sites_of(model).items() if name}


def named_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by the name of its site and its own: `blocks.0.attention.query.A`, `….query.weight`."""
    tensors: dict[int, tuple[str, nn.Parameter]] = {}
    for name, site in sites_of(model).items():
        for part in (*site.wrappers, site.module):
            for own, tensor in part.named_parameters(recurse=False):
                tensors.setdefault(id(tensor), (f"{name}.{own}" if name else own, tensor))
    return dict(tensors.values())


def all_wrappers(model: nn.Module) -> dict[str, list[Wrapper]]:
    """All wrappers of the model, from the outside in, by the name of what they wrap."""
    return {name: site.wrappers for name, site in sites_of(model).items() if site.wrappers}


def merged_wrappers(model: nn.Module) -> dict[str, Wrapper]:
    """The wrappers whose update is merged at present, by the name of what they wrap."""
    found = all_wrappers(model).items()
    return {name: wrapper for name, wrappers in found for wrapper in wrappers if wrapper.merged}


def find(targets: tuple[str, ...], candidates: Iterable[str], what: str) -> list[str]:
    """The names of all candidates that end in a target, by whole parts: `query` matches `attention.query`, not
    `query_norm`.

    Raises:
        ValueError: a target matches none of them, or no target is given; the message lists what exists. Also a bare
            string, which Python would take for a tuple of letters.
    """
    if isinstance(targets, str):
        raise ValueError(f'targets are a tuple of names, such as ("{targets}",), not the string {targets!r}')
    candidates = list(candidates)
    found = {target: {name for name in candidates if f".{name}".endswith(f".{target}")} for target in targets}
    if not all(found.values()) or not found:
        _refuse(found, candidates, what)
    return [name for name in candidates if any([name in names for names in found.values()])]


def _refuse(found: dict[str, set[str]], candidates: list[str], what: str) -> None:
    ends = ", ".join(sorted({name.split(".")[-1] for name in candidates}))
    if not found:
        raise ValueError(f"no target is given, so nothing would be trained; {what} here: {ends}")
    target = next(target for target, names in found.items() if not names)
    raise ValueError(
        f"target {target!r} matches no {what}; there are {ends} "
        f"(a target is compared by whole name parts: 'query', 'attention.query' or 'blocks.0.attention.query')"
    )


def block_names(modules: dict[str, nn.Module]) -> list[str]:
    """The names of the Transformer's blocks, in their order."""
    return [name for name, module in modules.items() if isinstance(module, Block)]


def layer_of(name: str, blocks: list[str]) -> int | None:
    """The number, in its own stack, of the block in which a module or tensor lies; None outside of blocks."""
    own = next((block for block in blocks if name.startswith(f"{block}.")), None)
    if own is None:
        return None
    stack = own.rpartition(".")[0]
    return [block for block in blocks if block.rpartition(".")[0] == stack].index(own)


def in_layers(names: list[str], modules: dict[str, nn.Module], layers: tuple[int, ...] | None) -> list[str]:
    """Those of the names that lie in the blocks of these numbers; all of them where `layers` is None.

    Raises:
        ValueError: a block that does not exist, or a name.
    """
    if missing := [name for name in names if name not in modules]:
        raise ValueError(f"there is no {missing[0]} to enter; name the blocks that have one by layers=(…)")
    if layers is None:
        return names
    blocks = block_names(modules)
    present = {layer_of(f"{block}.", blocks) for block in blocks}
    for layer in layers:
        if layer not in present:
            there = ", ".join(map(str, sorted(present))) or "none"
            raise ValueError(f"layers={layers} names block {layer}; there are {there}")
    return [name for name in names if layer_of(name, blocks) in layers]


def linear_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """The name and (d_in, d_out) of every linear map that a Transformer of that shape has, no model built."""
    d, d_ff = config.d_model, config.d_ff
    shapes = {f"attention.{name}": (d, d) for name in ("query", "key", "value", "output")}
    shapes |= {"feedforward.up": (d, d_ff), "feedforward.down": (d_ff, d)}
    everywhere = {f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in shapes.items()}
    return everywhere | ({"head.dense": (d, d)} if config.lm_head == "bert" else {})


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted as a reader counts: blocks.2 before blocks.10."""
    return sorted(names, key=lambda name: [(len(part) if part.isdigit() else 0, part) for part in name.split(".")])


def wrap(site: Site, wrapper: Wrapper) -> None:
    """Put `wrapper` in: inside of those that belong farther out than it, round all others."""
    around = [present for present in site.wrappers if present.order >= wrapper.order]
    inner = site.wrappers[len(around) :]
    wrapper.base = inner[0] if inner else site.module
    _replace(site, around, wrapper)
    site.wrappers.insert(len(around), wrapper)


def exchange(site: Site, old: Wrapper, new: Wrapper) -> None:
    """Put `new`, which wraps what `old` wraps, in its place."""
    place = site.wrappers.index(old)
    _replace(site, site.wrappers[:place], new)
    site.wrappers[place] = new


def unwrap(site: Site) -> None:
    """Put the frozen module itself back in its place."""
    site.wrappers.clear()
    _replace(site, [], site.module)


def _replace(site: Site, around: list[Wrapper], module: nn.Module) -> None:
    """Make `module` what the innermost of the wrappers around it wraps, or what the parent holds."""
    if around:
        around[-1].base = module
    else:
        setattr(site.parent, site.attribute, module)

"""Names: where in a model a method can enter, and how wrappers are put in and taken out.

A module keeps its name whatever is wrapped round it: `blocks.0.attention.query` is the query map of the first block,
also when it lies in `blocks.0.attention.base.query.base`. These names are the keys of `peft.state_dict`.
"""

from collections.abc import Collection, Iterable

from torch import nn

from minitransformer.config import TransformerConfig
from peft.method import Wrapper


def unwrapped(module: nn.Module) -> nn.Module:
    """The frozen module inside all wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def named_sites(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Every module below `model` by its name, wrappers looked through."""
    sites = {}
    for name, child in model.named_children():
        core, full = unwrapped(child), f"{prefix}{name}"
        sites[full] = core
        sites.update(named_sites(core, f"{full}."))
    return sites


def linear_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """The name and (d_in, d_out) of every linear map that a Transformer of that shape has, no model built."""
    d, d_ff = config.d_model, config.d_ff
    shapes = {f"attention.{name}": (d, d) for name in ("query", "key", "value", "output")}
    shapes |= {"feedforward.up": (d, d_ff), "feedforward.down": (d_ff, d)}
    everywhere = {f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in shapes.items()}
    return everywhere | ({"head.dense": (d, d)} if config.lm_head == "bert" else {})


def site_name(parameter_name: str) -> str:
    """The name of a parameter without the wrappers on its way: `…attention.base.query.A` -> `…attention.query.A`."""
    return ".".join(part for part in parameter_name.split(".") if part != "base")


def matches(target: str, name: str) -> bool:
    """Whether the name ends in the target, by whole parts: `query` matches `attention.query`, not `query_norm`."""
    parts = target.split(".")
    return name.split(".")[-len(parts) :] == parts


def find(targets: tuple[str, ...], candidates: Collection[str], what: str) -> list[str]:
    """The names of all candidates that a target matches.

    Raises:
        ValueError: a target matches none of them, or no target is given; the message lists what exists. Also a bare
            string, which Python would take for a tuple of letters.
    """
    if isinstance(targets, str):
        raise ValueError(f'targets are a tuple of names, such as ("{targets}",), not the string {targets!r}')
    ends = sorted({name.split(".")[-1] for name in candidates})
    if not targets:
        raise ValueError(f"no target is given, so nothing would be trained; {what} here: {', '.join(ends)}")
    for target in targets:
        if not any(matches(target, name) for name in candidates):
            raise ValueError(
                f"target {target!r} matches no {what}; there are {', '.join(ends)} "
                f"(a target is compared by whole name parts: 'query', 'attention.query' or 'blocks.0.attention.query')"
            )
    return [name for name in candidates if any(matches(target, name) for target in targets)]


def layer_of(name: str) -> int | None:
    """The number of the block that a module or tensor of that name belongs to; None outside of the blocks."""
    parts = name.split(".")
    return int(parts[parts.index("blocks") + 1]) if "blocks" in parts[:-1] else None


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted as a reader counts: blocks.2 before blocks.10."""
    return sorted(names, key=lambda name: [(len(part) if part.isdigit() else 0, part) for part in name.split(".")])


def in_layers(names: Iterable[str], layers: tuple[int, ...] | None) -> list[str]:
    """Those of the names that lie in the given blocks; all of them where `layers` is None.

    Raises:
        ValueError: a block that does not exist.
    """
    names = list(names)
    if layers is None:
        return names
    present = {layer_of(name) for name in names} - {None}
    for layer in layers:
        if layer not in present:
            raise ValueError(f"layers={layers} names block {layer}; there are {', '.join(map(str, sorted(present)))}")
    return [name for name in names if layer_of(name) in layers]


def wrappers_at(model: nn.Module, name: str) -> list[Wrapper]:
    """The wrappers round the module of that name, from the outside in."""
    parent, attribute = _parent(model, name)
    module, found = getattr(parent, attribute), []
    while isinstance(module, Wrapper):
        found.append(module)
        module = module.base
    return found


def all_wrappers(model: nn.Module) -> dict[str, list[Wrapper]]:
    """All wrappers of the model, by the name of what they wrap."""
    found = {name: wrappers_at(model, name) for name in named_sites(model)}
    return {name: wrappers for name, wrappers in found.items() if wrappers}


def merged_wrappers(model: nn.Module) -> dict[str, Wrapper]:
    """The wrappers whose update is written into a weight at present, by the name of what they wrap."""
    found = all_wrappers(model).items()
    return {name: wrapper for name, wrappers in found for wrapper in wrappers if wrapper.merged}


def wrap(model: nn.Module, name: str, wrapper: Wrapper) -> None:
    """Put `wrapper` in: inside of those that belong farther out than it, round all others."""
    parent, attribute = _parent(model, name)
    around = [present for present in wrappers_at(model, name) if present.order >= wrapper.order]
    if around:
        wrapper.base, around[-1].base = around[-1].base, wrapper
    else:
        wrapper.base = getattr(parent, attribute)
        setattr(parent, attribute, wrapper)


def trainability(model: nn.Module) -> dict[str, bool]:
    """Which tensors require a gradient, by name."""
    return {name: p.requires_grad for name, p in model.named_parameters()}


def restore_trainability(model: nn.Module, before: dict[str, bool]) -> None:
    """Make every tensor trainable or not, as it was."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])


def exchange(model: nn.Module, name: str, old: Wrapper, new: Wrapper) -> None:
    """Put `new` in the place of `old`, which wraps the module of that name."""
    parent, attribute = _parent(model, name)
    if getattr(parent, attribute) is old:
        setattr(parent, attribute, new)
    for wrapper in wrappers_at(model, name):
        if wrapper.base is old:
            wrapper.base = new


def unwrap(model: nn.Module, name: str) -> None:
    """Put the frozen module itself back in its place."""
    parent, attribute = _parent(model, name)
    setattr(parent, attribute, unwrapped(getattr(parent, attribute)))


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module = model
    *path, attribute = name.split(".")
    for part in path:
        module = unwrapped(getattr(module, part))
    return module, attribute

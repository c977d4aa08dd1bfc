"""Sites: where in a model a method can enter, and how wrappers are put in and taken out.

A module keeps its name whatever is wrapped round it: `blocks.0.attention.query` is the query of the first block, also
when it lies in `blocks.0.attention.base.query.base`, or behind a handle of `torch.compile`. These names are the keys of
`peft.state_dict`. A module that stands at several places is one site, under its first name.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minitransformer.block import Block
from minitransformer.config import TransformerConfig
from minitransformer.embedding import Embedding
from peft.method import Wrapper


class Site(NamedTuple):
    """A frozen module, the wrappers round it from the outside in, and each parent and attribute that holds them."""

    module: nn.Module
    wrappers: list[Wrapper]
    places: list[tuple[nn.Module, str]]  # none for the model itself

    @property
    def parts(self) -> list[nn.Module]:
        """From the outside in, the module last."""
        return [*self.wrappers, self.module]


def inside(module: nn.Module) -> nn.Module:
    """The module behind handles of `torch.compile` or of data parallelism; any other module itself."""
    handle = isinstance(module, (DistributedDataParallel, nn.DataParallel))
    held = module.module if handle else module._modules.get("_orig_mod")
    return module if held is None else inside(held)


def sites_of(model: nn.Module) -> dict[str, Site]:
    """Every site of the model by its name, the model itself ("") first; wrappers and handles are looked through."""
    found: dict[int, tuple[str, Site]] = {}
    stack: list[tuple[str, nn.Module, list]] = [("", model, [])]
    while stack:
        name, held, places = stack.pop()
        if id(held) in found:
            found[id(held)][1].places.extend(places)
            continue
        wrappers, module = [], inside(held)
        while isinstance(module, Wrapper) and name:
            wrappers.append(module)
            module = inside(module.base)
        found[id(held)] = name, Site(module, wrappers, places)
        for attribute, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((f"{name}.{attribute}".lstrip("."), child, [(module, attribute)]))
    return dict(found.values())


def named_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Every frozen module below `model` by its name."""
    return {name: site.module for name, site in sites_of(model).items() if name}


def named_tensors(model: nn.Module, buffers: bool = False) -> dict[str, Tensor]:
    """Every parameter once, by the name of its site and its own: `blocks.0.attention.query.A`, `….query.weight`. With
    `buffers` also those that a state dict holds, such as the running statistics of a BatchNorm."""
    names: dict[Tensor, str] = {}
    for name, site in sites_of(model).items():
        for part in site.parts:
            for own, tensor in own_tensors(part, buffers).items():
                names.setdefault(tensor, f"{name}.{own}".lstrip("."))
    return {name: tensor for tensor, name in names.items()}


def own_tensors(module: nn.Module, buffers: bool = False) -> dict[str, Tensor]:
    """The parameters of a module without those of the modules in it; with `buffers` also those of a state dict."""
    own = {**module._parameters, **(module._buffers if buffers else {})}
    return {name: t for name, t in own.items() if t is not None and name not in module._non_persistent_buffers_set}


def all_wrappers(model: nn.Module) -> dict[str, list[Wrapper]]:
    """All wrappers of the model, from the outside in, by the name of what they wrap."""
    return {name: site.wrappers for name, site in sites_of(model).items() if site.wrappers}


def merged_wrappers(model: nn.Module) -> dict[str, Wrapper]:
    """The wrappers whose update is merged at present, by the name of what they wrap."""
    return {name: w for name, wrappers in all_wrappers(model).items() for w in wrappers if w.merged}


def find(targets: tuple[str, ...], candidates: Iterable[str], what: str) -> list[str]:
    """The names of all candidates that end in a target, by whole parts: `query` matches `attention.query`, not
    `query_norm`. ValueError if a target matches none, or there is none; the message lists what exists."""
    candidates, ends = list(candidates), tuple(f".{target}" for target in targets)
    there = ", ".join(sorted({name.split(".")[-1] for name in candidates}))
    if isinstance(targets, str) or not ends:  # Python would take a string for a tuple of letters
        raise ValueError(f"no target is given: {targets!r} is no tuple of names; {what} here: {there}")
    for end in [end for end in ends if not any(f".{name}".endswith(end) for name in candidates)]:
        raise ValueError(f"target {end[1:]!r} matches no {what}; there are {there} (compared by whole parts of names)")
    return [name for name in candidates if f".{name}".endswith(ends)]


def named(names: tuple[str, ...], modules: dict[str, nn.Module]) -> list[str]:
    """The modules to be trained whole: `head` is the one of that full name, if there is one, and not also
    `transformer.head`; else every one that ends in it. ValueError as in `find`."""
    suffixes = names if isinstance(names, str) else tuple(name for name in names if name not in modules)
    found = find(suffixes, modules, "module") if suffixes else []
    return [name for name in modules if name in found or name in names]


def block_names(modules: dict[str, nn.Module]) -> list[str]:
    """The names of the Transformer's blocks, in their order."""
    return [name for name, module in modules.items() if isinstance(module, Block)]


def inner_modules(modules: dict[str, nn.Module]) -> list[str]:
    """The names of every module in a block, and of a Transformer's norms outside of them: the embedding's, the last."""
    blocks = tuple(f"{block}." for block in block_names(modules))
    owners = [n[: n.rfind(".") + 1] for n, module in modules.items() if isinstance(module, Embedding)]
    owners = [o for o in owners if any(b.startswith(o) and b.count(".") == o.count(".") + 2 for b in blocks)]
    outside = [f"{owner}{norm}" for owner in owners for norm in ("embedding.norm", "norm")]
    return [name for name in modules if name.startswith(blocks)] + [name for name in outside if name in modules]


def layer_of(name: str, blocks: list[str]) -> int | None:
    """The number, in its own stack, of the block in which a module or tensor lies; None outside of blocks."""
    own = next((block for block in blocks if name.startswith(f"{block}.")), None)
    stack = [block for block in blocks if own and block.rpartition(".")[0] == own.rpartition(".")[0]]
    return stack.index(own) if stack else None


def in_layers(names: list[str], modules: dict[str, nn.Module], layers: tuple[int, ...] | None) -> list[str]:
    """Those of the names that lie in the blocks of these numbers; all of them where `layers` is None. ValueError for a
    block, or a name in them, that does not exist."""
    if layers is not None:
        blocks = block_names(modules)
        there = sorted({layer_of(f"{block}.", blocks) for block in blocks})
        if absent := [layer for layer in layers if layer not in there]:
            raise ValueError(f"layers={layers} names block {absent[0]}; there are {str(there)[1:-1] or 'none'}")
        names = [name for name in names if layer_of(name, blocks) in layers]
    if missing := [name for name in names if name not in modules]:
        raise ValueError(f"there is no {missing[0]} to enter; name the blocks that have one by layers=(…)")
    return names


def linear_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """The name and (d_in, d_out) of every linear layer that a Transformer of that shape has, no model built."""
    d, d_query, d_kv, d_ff = config.d_model, config.n_heads * config.d_head, config.d_kv, config.d_ff
    shapes = {"attention.query": (d, d_query), "attention.key": (d, d_kv), "attention.value": (d, d_kv)}
    shapes |= {"attention.output": (d_query, d), "feedforward.up": (d, d_ff), "feedforward.down": (d_ff, d)}
    shapes |= {"feedforward.gate": (d, d_ff)} if config.gated else {}
    everywhere = {f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in shapes.items()}
    return everywhere | ({"head.dense": (d, d)} if config.lm_head == "bert" else {})


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted as a reader counts: blocks.2 before blocks.10."""
    return sorted(names, key=lambda name: [(len(part) if part.isdigit() else 0, part) for part in name.split(".")])


def arrange(site: Site, wrappers: list[Wrapper]) -> None:
    """Make these the wrappers of the module, wherever it stands: by `order`, and of one order the first outside."""
    site.wrappers[:] = sorted(wrappers, key=lambda wrapper: -wrapper.order)
    for outer, inner in pairwise(site.parts):
        outer.base = inner
    for parent, attribute in site.places:
        parent._modules[attribute] = site.parts[0]

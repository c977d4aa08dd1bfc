"""(IA)³ in Hugging Face's form (peft_type IA3).

    base_model.model.{module}.ia3_l    [d_out, 1]  a scale of the output: keys, values
                                       [1, d_in]   a scale of the input, for feedforward_modules

Theirs may scale more than the paper does, by default on GPT-2 the queries (c_attn is one layer) and on BERT the input
of attention's output layer. Both are exact as scales of the paper's: (l q) · k = q · (l k), where no rotation comes
between, and attention is linear in the values.
"""

from typing import Any

import torch
from torch import Tensor

from minitransformer.config import TransformerConfig
from peft.exchange.contents import FRONT, Found, Written, check_shape
from peft.exchange.names import PARTS, Names, ends_in
from peft.exchange.options import Options
from peft.exchange.targets import by_module, targets_of
from peft.methods.ia3 import IA3, PLACES, Rescaled

SCALE = "ia3_l"
# A scale that ours has not -> the one that does the same.
SAME = {("attention.query", "output"): "attention.key", ("attention.output", "input"): "attention.value"}


def written(wrappers: dict[str, Rescaled], names: Names) -> Written:
    """The folder's contents for these wrappers by site."""
    scales: dict[str, dict[str | None, Tensor]] = {}
    inputs = []
    for site, wrapper in wrappers.items():
        place = names.places[site]
        scales.setdefault(place.module, {})[place.part] = wrapper.scale
        inputs += [place.module] * (wrapper.side == "input")
    tensors = {}
    for module, parts in scales.items():
        if None not in parts:  # c_attn, of which the query has no scale
            scale = torch.cat([parts.get(part, torch.ones_like(parts["key"])) for part in PARTS])
        else:
            scale = parts[None]
        tensors[f"{FRONT}{module}.{SCALE}"] = scale[None] if module in inputs else scale[:, None]
    options = {
        "peft_type": "IA3",
        "target_modules": targets_of(scales, names),
        "feedforward_modules": targets_of(inputs, names),
        "init_ia3_weights": True,
    }
    return Written(options, tensors, {})


def found(options: Options, tensors: dict[str, Tensor], names: Names, record: dict[str, Any]) -> Found:
    """The recipe and the tensors that a folder holds.

    Raises:
        ValueError: an option, a name or a shape that does not fit; scales that ours has not.
    """
    inputs = options.names("feedforward_modules")
    options.unused({"init_ia3_weights": bool})
    modules = by_module(tensors, names, options, (SCALE,))
    if stray := [end for end in inputs if not any(ends_in(module, [end]) for module in modules)]:
        raise ValueError(f"feedforward_modules names {stray[0]!r}, but target_modules has no such layer; take it out")
    scales: dict[tuple[int, str, str], Tensor] = {}  # block, layer in it, side
    for module, own in modules.items():
        sites, side = names.modules[module], "input" if ends_in(module, inputs) else "output"
        d_in, d_out = names.shape(module)
        check_shape(f"{FRONT}{module}.{SCALE}", own[SCALE], *((1, d_in) if side == "input" else (d_out, 1)))
        if side == "input" and len(sites) > 1:
            raise ValueError(f"{module} is scaled at its input, for which our IA3 has no scale; choose another folder")
        scale = own[SCALE].flatten()
        for site, part in zip(sites.values(), scale.split(len(scale) // len(sites)), strict=True):
            where = site.removeprefix(names.root).split(".", 2)
            if where[0] != "blocks":
                raise ValueError(f"{module} has a scale, and our IA3 stays inside of blocks; choose another folder")
            scales[int(where[1]), where[2], side] = part
    blocks = sorted({block for block, _, _ in scales})
    ours = {}
    for block in blocks:
        own = {(layer, side): scale for (at, layer, side), scale in scales.items() if at == block}
        ours |= {names.site(f"blocks.{block}.{layer}.scale"): s for layer, s in _ours(own, block, names).items()}
    return Found([IA3(layers=None if len(blocks) == names.config.n_layers else tuple(blocks))], ours)


def _ours(scales: dict[tuple[str, str], Tensor], block: int, names: Names) -> dict[str, Tensor]:
    """The scales of one block, by the layers that ours has them at."""
    moved: dict[tuple[str, str], Tensor] = {}
    for (layer, side), scale in scales.items():
        other = SAME.get((layer, side)) if _may_move(layer, names.config) else None
        place = (layer, side) if other is None else (other, PLACES[other])
        moved[place] = scale * moved.get(place, 1)
    needed = {*PLACES.items()}
    if moved.keys() != needed:
        layer, side = min(moved.keys() ^ needed)
        has = "has" if (layer, side) in moved else "has not"
        raise ValueError(
            f"in block {block} the folder {has} a scale on the {side} of {layer}, and our IA3 scales the outputs of "
            f"key and value and the input of down, no more and no less; choose a folder with these"
        )
    return {layer: moved[layer, side] for layer, side in PLACES.items()}


def _may_move(layer: str, config: TransformerConfig) -> bool:
    """Whether keys and values have the numbers that a scale of queries, or of what they see, is for."""
    return config.d_kv == config.n_heads * config.d_head and not ("query" in layer and config.position == "rotary")

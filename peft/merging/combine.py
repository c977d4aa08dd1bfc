"""Several LoRAs as one: the weighted sum of their updates, exactly.

    w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2  =  [w_1 s_1 B_1 , w_2 s_2 B_2] [A_1 ; A_2]         s = alpha / r

The factors are put side by side along the rank, so the sum has rank r_1 + r_2. Averaging the A's and the B's instead
keeps the rank, and computes something else: the product of two sums has cross terms B_1 A_2 and B_2 A_1, which belong
to no task.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peft.attach import attached, state_dict
from peft.contents import read
from peft.method import Method
from peft.methods.dora import DoRA
from peft.methods.lora import LoRA
from peft.sites import in_order

Loaded = tuple[LoRA, dict[str, Tensor]]


def combine(loras: Sequence[nn.Module | str | Path | Loaded], weights: Sequence[float]) -> Loaded:
    """The weighted sum of several LoRAs, as a recipe and its tensors.

        recipe, tensors = combine(["polite.safetensors", "terse.safetensors"], [0.5, 0.5])
        load_state_dict(attach(model, recipe), tensors)

    Args:
        loras: each a model with one LoRA attached, a file that `save` wrote, or a recipe with its `state_dict`.
        weights: a factor for the update of each.

    Returns:
        A recipe of rank r_1 + r_2 + …, with alpha equal to its rank, so that its scale is 1; and A and B for every map
        that one of the LoRAs changes. Where another one does not, its part of the rank is zero.

    Raises:
        ValueError: no LoRA, a weight too many or too few or not finite, anything that is not a single plain LoRA, or
            LoRAs for models of different shapes.
    """
    if not loras or len(loras) != len(weights):
        raise ValueError(f"give one weight for each LoRA, and at least one LoRA; got {len(loras)} and {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"the weights must be finite numbers, got {list(weights)}")
    parts = [_loaded(lora) for lora in loras]
    sites = in_order({name.removesuffix(".A") for _, own in parts for name in own if name.endswith(".A")})
    rank = sum(recipe.rank for recipe, _ in parts)
    tensors = {}
    for site in sites:
        pairs = [_factors(site, recipe, own, parts) for recipe, own in parts]
        scales = [weight * recipe.scale for weight, (recipe, _) in zip(weights, parts, strict=True)]
        tensors[f"{site}.A"] = torch.cat([A for A, _ in pairs])
        tensors[f"{site}.B"] = torch.cat([scale * B for scale, (_, B) in zip(scales, pairs, strict=True)], dim=1)
    return LoRA(rank=rank, alpha=rank, targets=tuple(sites)), tensors


def _loaded(lora: nn.Module | str | Path | Loaded) -> Loaded:
    """The recipe and the tensors of one LoRA, wherever they are."""
    if isinstance(lora, nn.Module):
        recipes, tensors = [entry.method for entry in attached(lora)], state_dict(lora)
    elif isinstance(lora, (str, Path)):
        tensors, record = read(lora)
        recipes = [Method.from_dict(dict(values["recipe"])) for values in record["methods"]]
    else:
        recipe, tensors = lora
        recipes = [recipe]
    if len(recipes) != 1 or not isinstance(recipes[0], LoRA) or isinstance(recipes[0], DoRA):
        names = ", ".join(type(recipe).__name__ for recipe in recipes) or "nothing"
        raise ValueError(f"only a single plain LoRA can be combined, since its update is a sum; this one holds {names}")
    others = [name for name in tensors if not name.endswith((".A", ".B"))]
    if others:
        raise ValueError(f"{others[0]} is no factor of a LoRA; modules trained whole (train_also) cannot be combined")
    return recipes[0], tensors


def _factors(site: str, recipe: LoRA, own: dict[str, Tensor], parts: list[Loaded]) -> tuple[Tensor, Tensor]:
    """A and B of one LoRA at one place: zeros of its rank where it changes nothing."""
    shapes = {(t[f"{site}.A"].shape[1], t[f"{site}.B"].shape[0]) for _, t in parts if f"{site}.A" in t}
    if len(shapes) > 1:
        raise ValueError(f"{site} has the shapes {sorted(shapes)}: these LoRAs belong to different models")
    ((d_in, d_out),) = shapes
    if f"{site}.A" in own:
        return own[f"{site}.A"], own[f"{site}.B"]
    return torch.zeros(recipe.rank, d_in), torch.zeros(d_out, recipe.rank)

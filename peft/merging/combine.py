"""Several LoRAs as one: the weighted sum of their updates, exactly, or as near as a lower rank comes to it.

    w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2  =  [w_1 s_1 B_1 , w_2 s_2 B_2] [A_1 ; A_2]         s = alpha / r

The factors are put side by side along the rank, so the sum has rank r_1 + r_2. Averaging the A's and the B's instead
keeps the rank, and computes something else: the product of two sums has cross terms B_1 A_2 and B_2 A_1, which belong
to no task.

No matrix has a rank above its smaller side. Where the ranks add up to more, or a lower one is asked for, the factors
are made anew from the singular values of the product. The k largest give the nearest matrix of rank k (Eckart & Young
1936), and QR makes the decomposition a small one:

    B = Q_1 R_1,  Aᵀ = Q_2 R_2,  R_1 R_2ᵀ = U S Vᵀ         B' = Q_1 U_k S_k^½,   A' = S_k^½ V_kᵀ Q_2ᵀ
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft.attach import attached, state_dict
from peft.contents import base_hash, entries_of, read
from peft.methods.dora import DoRA
from peft.methods.lora import LoRA
from peft.sites import in_order

Loaded = tuple[LoRA, dict[str, Tensor]]


class Combined(tuple):
    """(recipe, tensors); `error` says by site how much of the sum they miss, ||sum - B' A'|| / ||sum|| (Frobenius)."""

    error: dict[str, float]


def combine(
    loras: Sequence[nn.Module | str | Path | Loaded], weights: Sequence[float], rank: int | None = None
) -> Combined:
    """The weighted sum of several LoRAs, as a recipe and its tensors.

        recipe, tensors = combine(["polite.safetensors", "terse.safetensors"], [0.5, 0.5])
        load_state_dict(attach(model, recipe), tensors)

    Args:
        loras: each a model with one LoRA attached, a file that `save` wrote, or a recipe with its `state_dict`.
        weights: a factor for the update of each.
        rank: k, for the nearest update of rank k, which misses `combine(…).error` of the sum; None: the sum itself.

    Returns:
        A recipe of rank k, or r_1 + r_2 + …, or the rank that the layers have room for, with alpha equal to its rank,
        so that its scale is 1; and A and B, on the CPU, for every layer that one of the LoRAs changes.

    Raises:
        ValueError: no LoRA, a weight too many or too few or not finite, anything that is not a single plain LoRA,
            LoRAs of different models, a NaN or an infinity, a rank that the sum does not have, or layers of which one
            has no room for the rank of another.
    """
    if not loras or len(loras) != len(weights):
        raise ValueError(f"give one weight for each LoRA, and at least one LoRA; got {len(loras)} and {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"the weights must be finite numbers, got {list(weights)}")
    recipes, tensors, bases = zip(*map(_loaded, loras), strict=True)
    if len(set(bases) - {None}) > 1:
        raise ValueError("these LoRAs belong to different models: they were trained on base weights that differ")
    scales = [weight * recipe.scale for weight, recipe in zip(weights, recipes, strict=True)]
    sites = in_order({name.removesuffix(".A") for own in tensors for name in own if name.endswith(".A")})
    stacks = {site: _side_by_side(site, tensors, [recipe.rank for recipe in recipes], scales) for site in sites}
    rank = _common_rank(rank, stacks, tensors)
    reduced = {site: (A, B, 0.0) if len(A) == rank else nearest(A, B, rank) for site, (A, B) in stacks.items()}
    factors = {f"{site}.{name}": t for site, (A, B, _) in reduced.items() for name, t in (("A", A), ("B", B))}
    combined = Combined((LoRA(rank=rank, alpha=rank, targets=tuple(sites)), factors))
    combined.error = {site: error for site, (_, _, error) in reduced.items()}
    return combined


def nearest(
    A: Float[Tensor, "R d_in"], B: Float[Tensor, "d_out R"], rank: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float]:
    """A' and B' of that rank with the product nearest to B A, and ||B A - B' A'|| / ||B A||. Eckart & Young 1936."""
    (Q_1, R_1), (Q_2, R_2) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_1 @ R_2.T, full_matrices=False)
    root = S[:rank].sqrt()
    error = float(S[rank:].norm() / S.norm()) if bool(S.any()) else 0.0
    return (root[:, None] * (Vh[:rank] @ Q_2.T)).to(A.dtype), (Q_1 @ U[:, :rank] * root).to(B.dtype), error


def _loaded(lora: nn.Module | str | Path | Loaded) -> tuple[LoRA, dict[str, Tensor], str | None]:
    """The recipe and the tensors of one LoRA, wherever they are, and the hash of its base where that is known."""
    base = None
    if isinstance(lora, nn.Module):
        recipes, tensors, base = [entry.method for entry in attached(lora)], state_dict(lora), base_hash(lora)
    elif isinstance(lora, (str, Path)):
        tensors, record = read(lora)
        recipes, base = [entry.method for entry in entries_of(lora, record)], record["base"]
    else:
        recipes, tensors = [lora[0]], lora[1]
    if len(recipes) != 1 or not isinstance(recipes[0], LoRA) or isinstance(recipes[0], DoRA):
        names = ", ".join(type(recipe).__name__ for recipe in recipes) or "nothing"
        raise ValueError(f"only a single plain LoRA can be combined, since its update is a sum; this one holds {names}")
    for name, tensor in tensors.items():
        if name[-2:] not in (".A", ".B") or tensor.shape[name.endswith("B")] != recipes[0].rank:
            raise ValueError(
                f"{name} is no factor of a LoRA of rank {recipes[0].rank}; modules trained whole (train_also) "
                f"cannot be combined, but peft.soup averages them"
            )
        if (other := name[:-1] + "BA"[name.endswith("B")]) not in tensors:
            raise ValueError(f"{name} has no {other}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds a NaN or an infinity; take tensors from before the training went wrong")
    return recipes[0], {name: tensor.cpu() for name, tensor in tensors.items()}, base


def _side_by_side(
    site: str, tensors: Sequence[dict[str, Tensor]], ranks: list[int], scales: list[float]
) -> tuple[Tensor, Tensor]:
    """A [R, d_in] and B [d_out, R] of the sum at one site; zeros for a LoRA that changes nothing there."""
    shapes = {(own[f"{site}.A"].shape[1], own[f"{site}.B"].shape[0]) for own in tensors if f"{site}.A" in own}
    if len(shapes) > 1:
        raise ValueError(f"{site} has the shapes {sorted(shapes)}: these LoRAs belong to different models")
    ((d_in, d_out),) = shapes
    A = [own.get(f"{site}.A", torch.zeros(r, d_in)) for own, r in zip(tensors, ranks, strict=True)]
    B = [own.get(f"{site}.B", torch.zeros(d_out, r)) for own, r in zip(tensors, ranks, strict=True)]
    return torch.cat(A), torch.cat([scale * part for scale, part in zip(scales, B, strict=True)], dim=1)


def _common_rank(asked: int | None, stacks: dict[str, tuple[Tensor, Tensor]], tensors: Sequence[dict]) -> int:
    """The rank of the result, which is one for all sites."""
    total = len(next(iter(stacks.values()))[0])
    room = {site: min(A.shape[1], B.shape[0]) for site, (A, B) in stacks.items()}
    highest = min(total, *room.values())
    if asked is not None and not 1 <= asked <= highest:
        raise ValueError(f"rank={asked} must be between 1 and {highest}; leave it out for the sum itself")
    if asked is not None or highest == total:
        return asked or total
    needed = {s: min(room[s], sum(len(own[f"{s}.A"]) for own in tensors if f"{s}.A" in own)) for s in room}
    if max(needed.values()) > highest:
        raise ValueError(
            f"the sum has rank {max(needed.values())} in one layer, and another has room for {highest} only; "
            f"rank={highest} gives the nearest that fits"
        )
    return max(needed.values())

"""Several LoRAs as one: the weighted sum of their updates, exactly, or as near as a lower rank comes to it.

    w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2  =  [w_1 s_1 B_1 , w_2 s_2 B_2] [A_1 ; A_2]         s = alpha / r

The factors are put side by side along the rank, so the sum has rank r_1 + r_2. Averaging the A's and the B's instead
keeps the rank, and computes something else: the product of two sums has cross terms B_1 A_2 and B_2 A_1, which belong
to no task.

No matrix has a rank above its smaller side. Where the ranks add up to more, or a lower one is asked for, the factors
are made anew: the k largest singular values of the product give the nearest matrix of rank k (Eckart & Young 1936).

    B = Q_1 R_1,  Aᵀ = Q_2 R_2,  R_1 R_2ᵀ = U S Vᵀ         B' = Q_1 U_k S_k^½,   A' = S_k^½ V_kᵀ Q_2ᵀ
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from peft.attach import attached, state_dict
from peft.contents import base_hash, entries_of, read
from peft.methods.dora import DoRA
from peft.methods.lora import LoRA
from peft.sites import in_order

Loaded = tuple[LoRA, dict[str, Tensor]]
Factors = tuple[Tensor, Tensor]  # A [r, d_in] and s B [d_out, r]


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
        A recipe of rank k, or r_1 + r_2 + … as far as the layers have room for it, with alpha equal to its rank, so
        that its scale is 1; and A and B, on the CPU, for every layer that one of the LoRAs changes.

    Raises:
        ValueError: no LoRA, a weight too many or too few or not finite, anything that is not a single plain LoRA with
            its finite factors, LoRAs of different models, a rank that the sum does not have, or that a layer has no
            room for.
    """
    if not loras or len(loras) != len(weights):
        raise ValueError(f"give one weight for each LoRA, and at least one LoRA; got {len(loras)} and {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"the weights must be finite numbers, got {list(weights)}")
    parts, bases = zip(*map(_loaded, loras), strict=True)
    if len(set(bases) - {None}) > 1:
        raise ValueError("these LoRAs belong to different models: they were trained on base weights that differ")
    stacks = {site: _side_by_side(site, parts, weights) for site in in_order(set().union(*parts))}
    rank = _rank_of(stacks, rank)
    combined = Combined((LoRA(rank=rank, alpha=rank, targets=tuple(stacks)), {}))
    combined.error = {}
    for site, stack in stacks.items():
        A, B, combined.error[site] = of_rank(rank, *stack)
        combined[1].update({f"{site}.A": A, f"{site}.B": B})
    return combined


def of_rank(rank: int, A: Float[Tensor, "R d_in"], B: Float[Tensor, "d_out R"]) -> tuple[Tensor, Tensor, float]:
    """A' [rank, d_in] and B' [d_out, rank] with the product nearest to B A, and ||B A - B' A'|| / ||B A||.

    Filled up with zeros where B A has a lower rank; else Eckart & Young 1936.
    """
    if (more := rank - len(A)) >= 0:
        return F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more)), 0.0
    (Q_1, R_1), (Q_2, R_2) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_1 @ R_2.T, full_matrices=False)
    root = S[:rank].sqrt()
    error = float(S[rank:].norm() / S.norm()) if bool(S.any()) else 0.0
    return (root[:, None] * (Vh[:rank] @ Q_2.T)).to(A.dtype), (Q_1 @ U[:, :rank] * root).to(B.dtype), error


def _rank_of(stacks: dict[str, Factors], asked: int | None) -> int:
    """The rank of the result, which is one for all sites."""
    room = [min(A.shape[1], B.shape[0]) for A, B in stacks.values()]
    own = max(min(len(A), most) for most, (A, _) in zip(room, stacks.values(), strict=True))
    if asked is None and own > min(room):
        raise ValueError(
            f"the sum has rank {own} in one layer, and another has room for {min(room)} only; rank={min(room)} gives "
            f"the nearest that fits"
        )
    if asked is not None and not 1 <= asked <= min(own, *room):
        raise ValueError(f"rank={asked} must be between 1 and {min(own, *room)}; leave it out for the sum itself")
    return asked or own


def _side_by_side(site: str, parts: Sequence[dict[str, Factors]], weights: Sequence[float]) -> Factors:
    """A [R, d_in] and B [d_out, R] of the sum at one site."""
    own = [(weight, *part[site]) for weight, part in zip(weights, parts, strict=True) if site in part]
    shapes = {(A.shape[1], B.shape[0]) for _, A, B in own}
    if len(shapes) > 1:
        raise ValueError(f"{site} has the shapes {sorted(shapes)}: these LoRAs belong to different models")
    return torch.cat([A for _, A, _ in own]), torch.cat([weight * B for weight, _, B in own], dim=1)


def _loaded(lora: nn.Module | str | Path | Loaded) -> tuple[dict[str, Factors], str | None]:
    """A and s B of one LoRA by site, wherever they are, and the hash of its base where that is known."""
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
    sites, r = {name.rpartition(".")[0] for name in tensors}, recipes[0].rank
    wrong = tensors.keys() ^ {f"{site}.{factor}" for site in sites for factor in "AB"}
    wrong = wrong or {n for n, t in tensors.items() if t.shape[n[-1] == "B"] != r or not bool(torch.isfinite(t).all())}
    if wrong:
        raise ValueError(
            f"{min(wrong)} is missing, not finite, or no factor of rank {r}; what was trained whole beside a LoRA "
            f"(train_also) cannot be combined, but peft.soup averages it"
        )
    factors = {name: tensor.cpu() for name, tensor in tensors.items()}
    return {site: (factors[f"{site}.A"], recipes[0].scale * factors[f"{site}.B"]) for site in sites}, base

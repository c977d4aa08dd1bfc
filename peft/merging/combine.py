"""Several LoRAs as one: the weighted sum of their updates, exactly, or as near as a lower rank comes to it.

    w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2  =  [w_1 s_1 B_1 , w_2 s_2 B_2] [A_1 ; A_2]         s = alpha / r

The factors are put side by side along the rank, so the sum has rank r_1 + r_2. Averaging the A's and the B's instead
keeps the rank, and computes something else: the product of two sums has cross terms B_1 A_2 and B_2 A_1, which belong
to no task.

No matrix has a rank above its smaller side. Where the ranks add up to more, or a lower one is asked for, the factors
are made anew: the k largest singular values of the product give the nearest matrix of rank k (Eckart & Young 1936).

    B = Q_1 R_1,  Aᵀ = Q_2 R_2,  R_1 R_2ᵀ = U S Vᵀ         B' = Q_1 U_k S_k^½,   A' = S_k^½ V_kᵀ Q_2ᵀ

A soup is the mean of runs of one recipe that differ in their seeds only. Runs that start from one pretrained model and
go not too far from it end in one valley of the loss: the mean of their weights lies inside, where it is often lower.

    W0 + 1/K (ΔW_1 + … + ΔW_K)                     one model, where an ensemble would run K of them

Source: Wortsman et al. 2022, "Model soups", section 2 (the uniform soup). Differs from the paper: its runs differ in
their settings as well, and its greedy soup leaves bad runs out.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from peft.attach import Attached, attach, attached, detach, load_state_dict, state_dict
from peft.contents import base_hash, entries_of, read
from peft.method import Method
from peft.methods.lora import LoRA
from peft.sites import all_wrappers, in_order

WithTensors = tuple[Method, Mapping[str, Tensor]]  # as of `state_dict`
Source = nn.Module | str | Path | Sequence[WithTensors]  # of methods: attached, in a file, or by themselves
NOT_COMBINED = "what was trained whole beside a LoRA (train_also) cannot be combined; peft.soup averages it"
Factors = dict[str, tuple[Tensor, Tensor]]  # by site A [r, d_in] and s B [d_out, r], this one in float64


class Combined(tuple):
    """(recipe, tensors); `error` says by site how much of the sum they miss, ||sum - B' A'|| / ||sum|| (Frobenius)."""

    error: dict[str, float]


def combine(
    loras: Sequence[nn.Module | str | Path | WithTensors], weights: Sequence[float], rank: int | None = None
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
    if not loras or len(loras) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"give at least one LoRA, and one weight for each, a finite number; got {list(weights)}")
    parts, beside, bases = zip(*map(_apart, loras), strict=True)
    if any(beside):
        raise ValueError(NOT_COMBINED)
    if len(set(bases) - {None}) > 1:
        raise ValueError("these LoRAs belong to different models: they were trained on base weights that differ")
    widest, *narrower = _summed(parts, weights, rank)
    if narrower:
        most, least = widest[0].rank, narrower[-1][0].rank
        raise ValueError(
            f"the sum has rank {most} in one layer, and another has room for {least} only; rank={least} gives the "
            f"nearest that fits"
        )
    combined = Combined(widest[:2])
    combined.error = widest[2]
    return combined


def soup(models: Sequence[nn.Module], base: nn.Module) -> nn.Module:
    """The mean of several LoRAs, and of the modules that were trained whole beside them, attached to `base`: one LoRA,
    and another for layers that have no room for its rank.

    Args:
        models: each with one LoRA attached, and the same modules in `train_also`.
        base: the frozen model that all of them started from, nothing attached; it is changed in place, and returned.

    Raises:
        ValueError: no model, other modules in `train_also`, another base, or what `combine` refuses. The base is as it
            was then.
    """
    if not models or attached(base):
        raise ValueError("a soup needs at least one model, and a base to which nothing is attached; detach(base) first")
    parts, beside, bases = zip(*map(_apart, models), strict=True)
    if len({str([(name, tensor.shape) for name, tensor in own.items()]) for own in beside}) > 1:
        raise ValueError("the models trained different modules beside their LoRA (train_also); choose those that agree")
    tensors, also = {}, attached(models[0])[0].train_also
    for name, first in beside[0].items():  # in float64, and a BatchNorm counts in whole numbers
        tensors[name] = torch.stack([own[name] for own in beside]).double().mean(dim=0).to(first.dtype)
    try:
        for recipe, factors, _ in _summed(parts, [1 / len(models)] * len(models)):
            attach(base, recipe, train_also=also)
            tensors, also = tensors | factors, ()
        if {*bases} != {base_hash(base)}:
            raise ValueError("the models were trained on other base weights; give the base that they started from")
        load_state_dict(base, tensors)
    except BaseException:
        if attached(base):
            detach(base)
        raise
    return base


def _summed(
    parts: Sequence[Factors], weights: Sequence[float], rank: int | None = None
) -> list[tuple[LoRA, dict[str, Tensor], dict[str, float]]]:
    """The sum at the rank k (None: at its own), and layers that have no room for it at the rank that they can have."""
    stacks = {site: _side_by_side(site, parts, weights) for site in in_order(set().union(*parts))}
    room = {site: min(A.shape[1], B.shape[0]) for site, (A, B) in stacks.items()}
    highest = max(min(len(A), room[site]) for site, (A, _) in stacks.items())
    if rank is not None and not 1 <= rank <= highest:
        raise ValueError(f"rank={rank} must be between 1 and {highest}; leave it out for the sum itself")
    found = {}
    for site, stack in stacks.items():
        k = min(rank or highest, room[site])
        tensors, error = found.setdefault(k, ({}, {}))
        tensors[f"{site}.A"], tensors[f"{site}.B"], error[site] = nearest(k, *stack)
    return [(LoRA(rank=k, alpha=k, targets=tuple(found[k][1])), *found[k]) for k in sorted(found, reverse=True)]


def _side_by_side(site: str, parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A [R, d_in] and B [d_out, R] of the sum at one site."""
    own = [(weight, *part[site]) for weight, part in zip(weights, parts, strict=True) if site in part]
    shapes = {(A.shape[1], B.shape[0]) for _, A, B in own}
    if len(shapes) > 1:
        raise ValueError(f"{site} has the shapes {sorted(shapes)}: these LoRAs belong to different models")
    return torch.cat([A for _, A, _ in own]), torch.cat([weight * B for weight, _, B in own], dim=1)


def nearest(rank: int, A: Float[Tensor, "R d_in"], B: Float[Tensor, "d_out R"]) -> tuple[Tensor, Tensor, float]:
    """A' [rank, d_in] and B' [d_out, rank] with the product nearest to B A, and ||B A - B' A'|| / ||B A||.

    Filled up with zeros where B A has a lower rank; else Eckart & Young 1936. In the precision of A.
    """
    if (more := rank - len(A)) >= 0:
        return F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more)).to(A.dtype), 0.0
    (Q_1, R_1), (Q_2, R_2) = torch.linalg.qr(B), torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_1 @ R_2.T, full_matrices=False)
    root, is_zero = S[:rank].sqrt(), S.norm() <= 1e-12 * R_1.norm() * R_2.norm()  # but for rounding
    error = 0.0 if is_zero else float(S[rank:].norm() / S.norm())
    return (root[:, None] * (Vh[:rank] @ Q_2.T)).to(A.dtype), (Q_1 @ U[:, :rank] * root).to(A.dtype), error


def _apart(lora: nn.Module | str | Path | WithTensors) -> tuple[Factors, dict[str, Tensor], str | None]:
    """The factors of one LoRA, wherever they are; what a model trained whole beside it; and the hash of its base."""
    entries, tensors, base = held(lora if isinstance(lora, (nn.Module, str, Path)) else [lora])
    if [type(entry.method) for entry in entries] != [LoRA]:
        names = ", ".join(type(entry.method).__name__ for entry in entries)
        raise ValueError(f"only a single plain LoRA can be combined, since its update is a sum; this one holds {names}")
    rank, tensors = entries[0].method.rank, {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    if entries[0].train_also and not isinstance(lora, nn.Module):
        raise ValueError(NOT_COMBINED)
    sites = all_wrappers(lora) if isinstance(lora, nn.Module) else {name.rpartition(".")[0] for name in tensors}
    own = {name: tensors.pop(name, None) for site in sites for name in (f"{site}.A", f"{site}.B")}
    for name, t in own.items():
        if t is None or t.ndim != 2 or t.shape[name[-1] == "B"] != rank or not bool(t.isfinite().all()):
            raise ValueError(f"{name} is missing, not finite, or no factor of rank {rank}")
    return {s: (own[f"{s}.A"], entries[0].method.scale * own[f"{s}.B"].double()) for s in sites}, tensors, base


def held(source: Source) -> tuple[list[Attached], dict[str, Tensor], str | None]:
    """The methods that a model, a file or a list holds, their tensors, and the hash of their base where it is known.

    Raises:
        ValueError: nothing is attached, no file of ours, or two tensors of one name.
    """
    if isinstance(source, nn.Module):
        return attached(source), state_dict(source), base_hash(source)
    if isinstance(source, str | Path):
        tensors, record = read(source)
        return entries_of(source, record), tensors, record["base"]
    tensors = {name: tensor for _, own in source for name, tensor in own.items()}
    if len(tensors) < sum(len(own) for _, own in source):
        raise ValueError("two recipes come with a tensor of the same name; give each its own")
    return [Attached(recipe, seed=0) for recipe, _ in source], tensors, None

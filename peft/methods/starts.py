"""PiSSA and LoftQ: a LoRA that starts from the weight, or from what rounding took from it, instead of from zero.

Sources: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", section 3, equations 2 to
4, and section 4 (QPiSSA). Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization", algorithm 1.

    PiSSA     s B A = [W]_r        Q = W - s B A              the principal part is trained, the residual is frozen
    QPiSSA    s B A = [W]_r        Q = q(W - s B A)           the same, and q rounds the residual
    LoftQ     s B A = [W - Q]_r    Q = q(W - s B A)           in turns, Q first, while B A is 0

    W = U S Vᵀ,   [W]_r = U_r S_r V_rᵀ,   B = U_r (S_r / s)^½,   A = (S_r / s)^½ V_rᵀ,   s = alpha / r

[W]_r is the matrix of rank r nearest to W (Eckart & Young 1936). Over a rounded base, a LoRA that starts at zero starts
from the model with q(W); these start nearer to W. Shapes: W, Q [d_out, d_in]; A [r, d_in], B [d_out, r].

What is attached is a `LoRA` like any other, but Q has replaced W: `disabled` computes with Q, `detach` leaves it, a
file belongs to a base with this Q. What training added is an update of W too, of rank 2 r; exactly so without q:

    start = recipe, state_dict(attach_pissa(model, recipe))
    ...
    wider, tensors = combine([(recipe, state_dict(model)), start], [1.0, -1.0])         # s [B, -B_0] [A ; A_0]

Differs from the papers: they have no scale, s = 1; and of the two signs of a pair of singular vectors we take that
which makes the largest entry of the right one positive, so that it starts alike on every machine.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.code_book import packed, unpacked
from minitransformer.config import check_whole
from minitransformer.quantized import check_layer, quantize
from minitransformer.quantized_layer import Quantized
from peft.attach import attach, attached, freeze, restore
from peft.functional import lora_weight
from peft.methods.lora import LoRA
from peft.sites import all_wrappers, block_names, layer_of, named_sites, sites_of

HOW = {"block": 64, "double": True}  # a model is rounded
Weight, FactorA, FactorB = Float[Tensor, "d_out d_in"], Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]


def attach_pissa(
    model: nn.Module, method: LoRA, storage: str | None = None, train_also: tuple[str, ...] = ()
) -> nn.Module:
    """Attach a LoRA that starts as the principal part of each target's weight, in place; returns the model.

    Args:
        model: not rounded yet, nothing attached.
        method: without dropout, which would drop parts of W itself.
        storage: None freezes the residuals as they are; with "nf4" or "int4" the model is quantised (QPiSSA).
        train_also: as in `attach`.

    Raises:
        ValueError: no plain LoRA, dropout, something is attached, a target's weight that is not finite or no plain
            tensor of its own, with a storage one outside of blocks, factors that overflow, since alpha is tiny, or what
            `attach` and `quantize` refuse. Nothing has changed then, nor after an interruption.
    """
    return _attach(model, method, lambda W, r, s, q: pissa(W, r, s), storage, train_also)


def attach_loftq(
    model: nn.Module, method: LoRA, storage: str = "nf4", steps: int = 1, train_also: tuple[str, ...] = ()
) -> nn.Module:
    """Quantise the model, and attach a LoRA that starts as near as it can to what that took from the targets; `steps`
    says how often rounding and correcting take turns. The rest is as in `attach_pissa`."""
    check_whole("steps", steps, 1)
    if storage is None:
        raise ValueError("storage=None: LoftQ corrects a rounding; attach_pissa starts without one")
    return _attach(model, method, partial(loftq, steps=steps), storage, train_also)


def pissa(weight: Weight, rank: int, scale: float) -> tuple[Weight, FactorA, FactorB]:
    """The residual, A and B. Meng et al. 2024, equations 2 to 4."""
    A, B = principal_factors(weight, rank, scale)
    return weight - lora_weight(A, B, scale), A, B


def loftq(
    weight: Weight, rank: int, scale: float, q: Callable[[Weight], Weight], steps: int
) -> tuple[Weight, FactorA, FactorB]:
    """That of which Q is made, A and B. Li et al. 2023, algorithm 1."""
    rest = weight
    A, B = principal_factors(weight - q(rest), rank, scale)
    for _ in range(steps - 1):
        rest = weight - lora_weight(A, B, scale)
        A, B = principal_factors(weight - q(rest), rank, scale)
    return rest, A, B


def principal_factors(weight: Weight, rank: int, scale: float) -> tuple[FactorA, FactorB]:
    """A and B, equally long, with scale * B A = [weight]_r."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    U, root, Vh = U[:, :rank], (S[:rank] / abs(scale)).sqrt(), Vh[:rank]
    sign = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).sign()[:, 0]
    A, B = (sign * root)[:, None] * Vh, math.copysign(1, scale) * sign * root * U
    return A.to(weight.dtype), B.to(weight.dtype)


@torch.inference_mode(False)
@torch.no_grad()
def _attach(
    model: nn.Module, method: LoRA, start: Callable, storage: str | None, train_also: tuple[str, ...]
) -> nn.Module:
    if type(method) is not LoRA or method.dropout:
        raise ValueError(f"{method} cannot start from the weight itself; give a plain LoRA with dropout=0.0")
    if attached(model):
        raise ValueError("the weights below what is attached would change; detach(model) first, and attach it later")
    attach(model, method, train_also=train_also)  # refuses what does not fit
    names = [*all_wrappers(model)]
    restore(model)
    modules = named_sites(model)
    for name in names:
        check_layer(model, name, modules[name])
        if modules[name].weight.is_inference():
            raise ValueError(f"the weight of {name} cannot change: it is of inference mode; build the model outside")
        if storage is not None and layer_of(name, block_names(modules)) is None:
            raise ValueError(f"{name} is in no block, and so is not rounded; choose other targets")
    try:
        if storage is not None:
            freeze(sites_of(model))
            quantize(model, storage, **HOW)
        attach(model, method, train_also=train_also)
        for name, (wrapper,) in all_wrappers(model).items():
            W = modules[name].weight.to(wrapper.A.dtype)
            rest, A, B = start(W, method.rank, method.scale, partial(_rounded, storage))
            if not bool(A.isfinite().all() & B.isfinite().all()):
                raise ValueError(f"the factors of {name} are too large for {A.dtype}; choose alpha nearer to the rank")
            wrapper.A.copy_(A), wrapper.B.copy_(B)
            if storage is not None:
                for own, tensor in zip(wrapper.base.stored, packed(rest, storage, **HOW).values(), strict=True):
                    own.copy_(tensor)
    except BaseException:
        for name, site in sites_of(model).items():
            for parent, attribute in site.places if isinstance(site.module, Quantized) else ():
                parent._modules[attribute] = modules[name]
        restore(model)
        raise
    if storage is None:  # at the end: a weight that was written to does not come back
        for (wrapper,) in all_wrappers(model).values():
            wrapper.base.weight.sub_(lora_weight(wrapper.A, wrapper.B, method.scale))
    return model


def _rounded(storage: str, weight: Weight) -> Weight:
    return unpacked(storage, **packed(weight, storage, **HOW)).to(weight.dtype)

"""LoRA's fast form: one product with W0 + ΔW, and a backward pass written by hand.

Source: Hu et al. 2022, section 4.1, equation 3; the gradients follow from it by the chain rule.

The plain form adds `lora_update` to what the frozen map gives: two thin products and a sum, each a pass over all
tokens. This form puts the sum into the weight first, where no token is:

    W = W0 + s B A                      y = x Wᵀ + b

Left to autograd, that would cost more than it saves: a gradient of W, as large as W, would be made from all tokens, to
be multiplied by A and B afterwards. By hand it is never formed; with g = dL/dy, and tokens as rows:

    dL/dx = g W            dL/dA = s (g B)ᵀ x            dL/dB = s gᵀ (x Aᵀ)

Shapes: x [N, d_in], g [N, d_out], W0 [d_out, d_in], A [r, d_in], B [d_out, r]; s = alpha / r.

Differs from the plain form: in rounding only. It has no dropout, which would fall on x in one of the two terms.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.fast.stand_in import may_stand_in
from peft.method import Wrapper


def fast_lora(
    x: Float[Tensor, "*rows d_in"],
    frozen_weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    scale: float | int,
) -> Float[Tensor, "*rows d_out"]:
    """W0 x + b + scale * B A x, with gradients for x, A and B; none for W0 and b, which are frozen.

    Hu et al. 2022, equation 3; scale = alpha / r.
    """
    return FastLoRA.apply(x, frozen_weight, bias, A, B, float(scale))


def is_known(layer: Wrapper, x: Tensor) -> bool:
    """Whether the fast form may stand in for a LoRA layer's plain one here, so that nobody could tell.

    It may round a plain, frozen linear map of the factors' own precision that nobody watches, where no dropout falls
    on x.
    """
    base = layer.base
    plain = type(base) is nn.Linear and not (layer.training and layer.recipe.dropout)
    if not plain or not may_stand_in(x, layer, base) or any([p.requires_grad for p in base.parameters()]):
        return False
    return x.dtype == base.weight.dtype == layer.A.dtype


class FastLoRA(torch.autograd.Function):
    """y = x (W0 + s B A)ᵀ + b and its three gradients. Keeps x, A and B for the backward pass; W is made again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, frozen_weight, bias, A, B, scale):
        return F.linear(x, torch.addmm(frozen_weight, B, A, alpha=scale), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, frozen_weight, _, A, B, ctx.scale = inputs
        factors_learn = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(x if factors_learn else None, frozen_weight, A, B)  # else no token need be kept

    @staticmethod
    def backward(ctx, g):
        x, frozen_weight, A, B = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        dx = dA = dB = None
        if needs_x:
            dx = g @ torch.addmm(frozen_weight, B, A, alpha=ctx.scale)
        if needs_A or needs_B:
            x, g = x.flatten(0, -2), g.flatten(0, -2)  # [N, d_in], [N, d_out]
        if needs_A:
            dA = (ctx.scale * (g @ B)).T @ x
        if needs_B:
            dB = g.T @ (ctx.scale * (x @ A.T))
        return dx, None, None, dA, dB, None

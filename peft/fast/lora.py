"""LoRA's fast form: one product with W0 + ΔW, and a backward pass written by hand.

Source: Hu et al. 2022, section 4.1, equation 3; the gradients follow from it by the chain rule.

The plain form adds `lora_update` to what the frozen layer gives: two thin products and a sum, each a pass over all
tokens. This form puts the sum into the weight first, where no token is. Left to autograd, that would cost more than it
saves: a gradient of W, as large as W, would be made from all tokens, to be multiplied by A and B afterwards. By hand it
is never formed; with g = dL/dy, and tokens as rows:

    W = W0 + s B A                      y = x Wᵀ + b
    dL/dx = g W            dL/dA = s (g B)ᵀ x            dL/dB = s gᵀ (x Aᵀ)

Shapes: x [N, d_in], g [N, d_out], W0 [d_out, d_in], A [r, d_in], B [d_out, r]; s = alpha / r. If W0 and b
learn as well, their gradients are gᵀ x and the sum of g. A quantised W0 is kept as bytes, and unpacked twice.

Differs from the plain form: in rounding only. It has no dropout, which would fall on x in one of the two terms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.fast.stand_in import may_stand_in
from minitransformer.quantized_layer import QuantizedLinear, precision, unpacking
from peft.functional import FactorA, FactorB, Inputs, Outputs, OutputVector, Weight
from peft.method import Wrapper


def is_known(layer: Wrapper, x: Tensor) -> bool:
    """Whether it may stand in for the plain form: round a plain or quantised linear layer in one precision, without
    dropout."""
    base = layer.base
    known = type(base) in (nn.Linear, QuantizedLinear) and not (layer.training and layer.recipe.dropout)
    if not known or not may_stand_in(x, layer, base):
        return False
    return x.dtype == precision(base) == layer.A.dtype


def fast_lora(
    x: Inputs, frozen: Weight | nn.Linear, bias: OutputVector | None, A: FactorA, B: FactorB, scale: float | int
) -> Outputs:
    """W0 x + b + scale * B A x, where `frozen` is W0 or holds it. Hu et al. 2022, equation 3; scale = alpha / r."""
    unpack, stored = unpacking(frozen)
    return FastLoRA.apply(x, bias, A, B, scale, unpack, *stored)


class FastLoRA(torch.autograd.Function):
    """y = x (W0 + s B A)ᵀ + b and its gradients. Keeps x, A, B and what W0 is unpacked from; W is made again."""

    @staticmethod
    def forward(ctx, x, bias, A, B, scale, unpack, *stored):
        _, _, A_learns, B_learns, _, _, *weight_learns = ctx.needs_input_grad
        tokens = x if weight_learns[0] or A_learns or B_learns else None  # else no token need be kept
        ctx.save_for_backward(tokens, A, B, *stored)
        ctx.scale, ctx.unpack = scale, unpack
        return F.linear(x, torch.addmm(unpack(*stored).to(A.dtype), B, A, alpha=scale), bias)

    @staticmethod
    def backward(ctx, g):
        x, A, B, *stored = ctx.saved_tensors
        needs_x, needs_bias, needs_A, needs_B, _, _, *needs_weight = ctx.needs_input_grad
        dx = g @ torch.addmm(ctx.unpack(*stored).to(A.dtype), B, A, alpha=ctx.scale) if needs_x else None
        g, x = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (g, x))  # [N, d_out], [N, d_in]
        dbias = g.sum(dim=0) if needs_bias else None
        dA = (ctx.scale * (g @ B)).T @ x if needs_A else None
        dB = g.T @ (ctx.scale * (x @ A.T)) if needs_B else None
        return dx, dbias, dA, dB, None, None, *[g.T @ x if needs else None for needs in needs_weight]

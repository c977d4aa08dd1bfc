"""LoRA's fast form: one product with W0 + ΔW, and a backward pass written by hand.

Source: Hu et al. 2022, section 4.1, equation 3; the gradients follow from it by the chain rule.

The plain form adds `lora_update` to what the frozen layer gives: two thin products and a sum, each a pass over all
tokens. This form puts the sum into the weight first, where no token is. Left to autograd, that would cost more than it
saves: a gradient of W, as large as W, would be made from all tokens, to be multiplied by A and B afterwards. By hand it
is never formed; with g = dL/dy, and tokens as rows:

    W = W0 + s B A                      y = x Wᵀ + b
    dL/dx = g W            dL/dA = s (g B)ᵀ x            dL/dB = s gᵀ (x Aᵀ)

Shapes: x [N, d_in], g [N, d_out], W0 [d_out, d_in], A [r, d_in], B [d_out, r]; s = alpha / r. If W0 and b
learn as well, their gradients are gᵀ x and the sum of g.

Differs from the plain form: in rounding only. It has no dropout, which would fall on x in one of the two terms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.fast.stand_in import may_stand_in
from peft.functional import FactorA, FactorB, Inputs, Outputs, OutputVector, Weight
from peft.method import Wrapper


def is_known(layer: Wrapper, x: Tensor) -> bool:
    """Whether it may stand in for the plain form: round a plain linear layer in one precision, without dropout."""
    base = layer.base
    if type(base) is not nn.Linear or (layer.training and layer.recipe.dropout) or not may_stand_in(x, layer, base):
        return False
    return x.dtype == base.weight.dtype == layer.A.dtype


class FastLoRA(torch.autograd.Function):
    """y = x (W0 + s B A)ᵀ + b and its gradients. Keeps x, A and B for the backward pass; W is made again."""

    @staticmethod
    def forward(
        ctx, x: Inputs, frozen_weight: Weight, bias: OutputVector | None, A: FactorA, B: FactorB, scale: float | int
    ) -> Outputs:
        """W0 x + b + scale * B A x. Hu et al. 2022, equation 3; scale = alpha / r."""
        _, weight_learns, _, A_learns, B_learns, _ = ctx.needs_input_grad
        tokens = x if weight_learns or A_learns or B_learns else None  # else no token need be kept
        ctx.save_for_backward(tokens, frozen_weight, A, B)
        ctx.scale = scale
        return F.linear(x, torch.addmm(frozen_weight, B, A, alpha=scale), bias)

    @staticmethod
    def backward(ctx, g):
        x, frozen_weight, A, B = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        dx = g @ torch.addmm(frozen_weight, B, A, alpha=ctx.scale) if needs_x else None
        g, x = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (g, x))  # [N, d_out], [N, d_in]
        dweight = g.T @ x if needs_weight else None
        dbias = g.sum(dim=0) if needs_bias else None
        dA = (ctx.scale * (g @ B)).T @ x if needs_A else None
        dB = g.T @ (ctx.scale * (x @ A.T)) if needs_B else None
        return dx, dweight, dbias, dA, dB, None


fast_lora = FastLoRA.apply

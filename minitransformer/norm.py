"""Norms: what keeps the residual stream at a steady size, at the input or the output of each sublayer.

    LayerNorm   (x - mean(x)) / sqrt(var(x) + eps) ⊙ g + b              Ba et al. 2016, equation 4; PyTorch's own module
    RMSNorm     x / sqrt(mean(x²) + eps) ⊙ g                            Zhang & Sennrich 2019, equation 4

RMSNorm leaves out the mean and the bias: it only rescales. The Llama family has it.

Shapes: x [..., d_model], g and b [d_model]. Differs from the paper: eps under the root, as in every checkpoint.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig

Rows = Float[Tensor, "*rows d"]


def rms_norm(x: Rows, gain: Float[Tensor, " d"], eps: float) -> Rows:
    """x / sqrt(mean(x²) + eps) ⊙ g. Zhang & Sennrich 2019, equation 4. Of 16-bit numbers the mean is taken in 32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * gain


class RMSNorm(nn.Module):
    """A gain `weight` [d], and no bias."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(self, x: Rows) -> Rows:
        """Zhang & Sennrich 2019, equation 4."""
        return rms_norm(x, self.weight, self.eps)


def norm_of(config: TransformerConfig) -> nn.Module:
    """A fresh norm of the kind that the config names."""
    return (RMSNorm if config.norm_type == "rms" else nn.LayerNorm)(config.d_model, eps=config.norm_eps)

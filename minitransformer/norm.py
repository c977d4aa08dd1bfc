"""Norms: what keeps the residual stream at a steady size, at the input or the output of each sublayer.

    LayerNorm   (x - mean(x)) / sqrt(var(x) + eps) ⊙ g + b              Ba et al. 2016, equation 4; PyTorch's own module
    RMSNorm     x / sqrt(mean(x²) + eps) ⊙ g                            Zhang & Sennrich 2019, equation 4

Shapes: x [..., d_model], g and b [d_model]. Differs from the papers: eps under the root, as in every checkpoint.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig


def norm_of(config: TransformerConfig) -> nn.Module:
    """A fresh norm of the kind that the config names."""
    return (RMSNorm if config.norm_type == "rms" else nn.LayerNorm)(config.d_model, eps=config.norm_eps)


class RMSNorm(nn.Module):
    """It only rescales: a gain `weight` [d], no mean and no bias. As in the Llama family."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Zhang & Sennrich 2019, equation 4. For 16-bit numbers the mean is taken in 32 bits."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # mean(x²) = length² / d, with a cheaper gradient
        return (wide * torch.rsqrt(length.square() / x.shape[-1] + self.eps)).to(x.dtype) * self.weight

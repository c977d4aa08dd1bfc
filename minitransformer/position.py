"""Rotary positions: queries and keys are turned by their positions, so their product knows how far apart they are.

Source: Su et al. 2021, "RoFormer", section 3.2.2, equations 14 and 15 (34 is the form that is computed).

    angle_i(t) = t θ^(-2i / d_head)                                     i = 0 … d_head / 2 - 1
    R(t) turns each pair (a_i, b_i) by its angle:  (a cos - b sin,  b cos + a sin)
    (R(t) q) · (R(s) k)  depends on t - s alone

A pair is (x_i, x_{i + d_head / 2}), one number of each half, as in Hugging Face's checkpoints. Values are not turned.

Shapes: q [B, H, T, d_head], k [B, H_kv, T, d_head], cos and sin [B, 1, T, d_head / 2].

Differs from the paper: it pairs neighbours, (x_2i, x_{2i + 1}), which is another order of the rows of W_q and W_k.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.attention import Attention, Context, Mask

Heads = Float[Tensor, "B H T d_head"]
Angles = Float[Tensor, "#B 1 T half"]


def rotary(positions: Int[Tensor, "B T"], d_head: int, theta: float) -> tuple[Angles, Angles]:
    """cos and sin of t θ^(-2i / d_head), in float32, as checkpoints are trained with. Su et al. 2021, equation 15."""
    frequency = 1.0 / theta ** (torch.arange(0, d_head, 2, device=positions.device).float() / d_head)
    angles = positions[:, None, :, None].float() * frequency
    return angles.cos(), angles.sin()


def rotated(x: Heads, cos: Angles, sin: Angles) -> Heads:
    """R(t) x: each pair turned by its angle. Su et al. 2021, equation 34."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Rotary(Context):
    """Turns queries and keys, and hands them on. So a KV cache `behind` it keeps keys that are turned already, and what
    comes in front of the text, such as a prefix, is not turned: it has no position."""

    def __init__(self, cos: Angles, sin: Angles, behind: Context | None = None):
        self.angles, self.behind = (cos, sin), behind

    def attend(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """As `Context.attend`, of R(t) q and R(t) k."""
        attend = attention if self.behind is None else partial(self.behind.attend, attention)
        return attend(rotated(q, *self.angles), rotated(k, *self.angles), v, mask)


def in_front(attention: Attention, keys: Float[Tensor, "1 n d"]) -> Float[Tensor, "1 n d"]:
    """An attention layer's keys of n words as a text behind them sees them: turned to the positions -n … -1."""
    if attention.rope_theta is None:
        return keys
    heads, before = attention.split_heads(keys), torch.arange(-keys.shape[1], 0, device=keys.device)[None]
    return rotated(heads, *rotary(before, heads.shape[-1], attention.rope_theta)).transpose(1, 2).flatten(2)

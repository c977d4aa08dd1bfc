"""The last block where one position of each row is asked for: it computes that one only.

A hidden state that nobody reads need not be computed, but its key and its value are seen. So the position's own hidden
state goes through the block, and the keys and values of all others stand beside it, as a context:

    block(x)[:, t]  =  block(x[:, t]; keys and values of x without t)

Shapes: x [B, T, d_model], one t for each row [B] -> [B, 1, d_model].

Differs from the plain form (`block(x)`, of which one position is taken): in rounding only.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention, Context, Mask
from minitransformer.block import Block
from minitransformer.fast.stand_in import may_stand_in, says
from minitransformer.feedforward import FeedForward
from minitransformer.heads import picked


POSITION_WISE = (Block, Attention, FeedForward, nn.Linear, nn.LayerNorm)


class Beside(Context):
    """The keys and values of all positions, [B, H, S, d_head]; `visible` [B, S] says which the one query may see."""

    def __init__(self, key: Tensor, value: Tensor, visible: Bool[Tensor, "B S"]):
        self.key, self.value, self.visible = key, value, visible

    def attend(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        """Attention over all positions and, behind them, the asked one."""
        visible = torch.cat([self.visible, self.visible.new_ones(len(q), 1)], dim=1)[:, None, None]  # [B, 1, 1, S + 1]
        return attention(q, torch.cat([self.key, k], dim=2), torch.cat([self.value, v], dim=2), visible)


def at_position(
    block: nn.Module, x: Float[Tensor, "B T d_model"], mask: Mask, context: Context | None, asked: Int[Tensor, "B"]
) -> Float[Tensor, "B 1 d_model"]:
    """`block(x, mask, context)` at one position of each row."""
    known, parts = None, list(block.modules())
    if type(block) is Block and context is None and all(map(is_position_wise, parts)) and may_stand_in(x, *parts):
        known = block.attention.keys_and_values(block.norm_attention(x) if block.pre_norm else x)
    if known is None:
        return picked(block(x, mask, context), asked)
    return block(picked(x, asked), None, Beside(*known, seen_from(asked, x, mask)))


def is_position_wise(module: nn.Module) -> bool:
    """Whether a position's output depends on no other position, but for the keys and values that its query sees.

    A wrapper's class says so by `position_wise = True`.
    """
    return type(module) in POSITION_WISE or says(module, "position_wise")


def seen_from(asked: Int[Tensor, "B"], x: Float[Tensor, "B T d_model"], mask: Mask) -> Bool[Tensor, "B T"]:
    """Which other positions the asked one may see."""
    own, place = asked[:, None], torch.arange(x.shape[1], device=x.device)
    if mask is None:
        return place != own
    if isinstance(mask, str):
        return place < own
    rows = mask.expand(len(x), -1, -1, -1)[torch.arange(len(x), device=x.device), 0, asked]
    return rows & (place != own)

"""The last block where one position of each row is asked for: it computes that one only.

A hidden state that nobody reads need not be computed, but its key and its value are seen. So the position's own hidden
state goes through the block, and the keys and values of the whole row stand in the place of its own:

    block(x)[:, t]  =  block(x[:, t]; keys and values of x)

Shapes: x [B, T, d_model], one t for each row [B] -> [B, 1, d_model].

Differs from the plain form (`block(x)`, of which one position is taken): in rounding only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention, Context, Hidden, Mask
from minitransformer.block import Block
from minitransformer.fast.stand_in import may_stand_in, says
from minitransformer.feedforward import FeedForward
from minitransformer.heads import picked

POSITION_WISE = (Block, Attention, FeedForward, nn.Linear, nn.LayerNorm)


@dataclass
class RowContext(Context):
    """The keys and values of whole rows, [B, H, T, d_head]; `visible` [B, 1, 1, T] says which the one query may see."""

    key: Tensor
    value: Tensor
    visible: Bool[Tensor, "B 1 1 T"] | None

    def attend(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        """Attention over all positions, among which those of k and v are."""
        return attention(q, self.key, self.value, self.visible)


def at_position(
    block: nn.Module, x: Hidden, mask: Mask, context: Context | None, asked: Int[Tensor, "B"]
) -> Float[Tensor, "B 1 d_model"]:
    """`block(x, mask, context)` at one position of each row."""
    known = type(block) is Block and context is None and all(map(is_position_wise, block.modules()))
    if not known or not may_stand_in(x, *block.modules()):
        return picked(block(x, mask, context), asked)
    key, value = block.attention.keys_and_values(block.norm_attention(x) if block.pre_norm else x)
    if isinstance(mask, str):  # "causal"
        mask = (torch.arange(x.shape[1], device=x.device) <= asked[:, None])[:, None, None]
    elif mask is not None:
        mask = mask.expand(len(x), -1, -1, -1)[torch.arange(len(x), device=x.device), :, asked][:, :, None]
    return block(picked(x, asked), None, RowContext(key, value, mask))


def is_position_wise(module: nn.Module) -> bool:
    """Whether a position's output depends on no other position, but for the keys and values that its query sees.

    A wrapper's class says so by `position_wise = True`.
    """
    return type(module) in POSITION_WISE or says(module, "position_wise")

"""One Transformer block: attention moves information between tokens, the feed-forward network works on each.

Source: Vaswani et al. 2017, section 3.1 ("post": norm after the sum); Radford et al. 2019, section 2.3 ("pre": norm
before the sublayer, as in GPT-2).

    pre:    x = x + Attention(norm_attention(x));      x = x + FFN(norm_feedforward(x))
    post:   x = norm_attention(x + Attention(x));      x = norm_feedforward(x + FFN(x))

Shapes: [B, T, d_model] -> [B, T, d_model].
"""

import torch.nn.functional as F
from torch import nn

from minitransformer.attention import Attention, Context, GroupedQueryAttention, Hidden, Mask
from minitransformer.config import TransformerConfig
from minitransformer.feedforward import FeedForward, GatedFeedForward
from minitransformer.norm import norm_of


class Block(nn.Module):
    """Two sublayers, `attention` and `feedforward`, each with its norm and its residual sum."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.dropout = config.dropout
        self.norm_attention = norm_of(config)
        self.attention = (GroupedQueryAttention if config.n_kv_heads else Attention)(config)
        self.norm_feedforward = norm_of(config)
        self.feedforward = (GatedFeedForward if config.gated else FeedForward)(config)

    def extra_repr(self) -> str:
        return "pre-norm" if self.pre_norm else "post-norm"

    def forward(self, x: Hidden, mask: Mask = None, context: Context | None = None) -> Hidden:
        """Arguments as in `Attention.forward`."""
        p = self.dropout if self.training else 0.0
        if self.pre_norm:
            x = x + F.dropout(self.attention(self.norm_attention(x), mask, context), p)
            return x + F.dropout(self.feedforward(self.norm_feedforward(x)), p)
        x = self.norm_attention(x + F.dropout(self.attention(x, mask, context), p))
        return self.norm_feedforward(x + F.dropout(self.feedforward(x), p))

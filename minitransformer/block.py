"""One Transformer block: attention moves information between tokens, the feed-forward network works on each.

Source: Vaswani et al. 2017, section 3.1 ("post": norm after the sum); Radford et al. 2019, section 2.3 ("pre": norm
before the sublayer, as in GPT-2).

    pre:    x = x + Attention(norm_attention(x));      x = x + FFN(norm_feedforward(x))
    post:   x = norm_attention(x + Attention(x));      x = norm_feedforward(x + FFN(x))

Shapes: [B, T, d_model] -> [B, T, d_model].
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention, picked
from minitransformer.cache import LayerCache
from minitransformer.config import TransformerConfig
from minitransformer.feedforward import FeedForward


class Block(nn.Module):
    """Two sublayers, `attention` and `feedforward`, each with its LayerNorm and its residual sum."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.dropout = config.dropout
        self.norm_attention = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm_feedforward = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.feedforward = FeedForward(config)

    def extra_repr(self) -> str:
        return "pre-norm" if self.pre_norm else "post-norm"

    def forward(
        self,
        x: Float[Tensor, "B T d_model"],
        mask: Bool[Tensor, "#B 1 T S"] | None = None,
        cache: LayerCache | None = None,
        weights: list | None = None,
        asked: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B Q d_model"]:
        """Arguments as in `Attention.forward`: with `asked`, one position of each row comes out, [B, 1, d_model]."""
        rest = (mask, cache, weights) if asked is None else (mask, cache, weights, asked)
        kept = x if asked is None else picked(x, asked)
        if self.pre_norm:
            x = kept + self._drop(self.attention(self.norm_attention(x), *rest))
            return x + self._drop(self.feedforward(self.norm_feedforward(x)))
        x = self.norm_attention(kept + self._drop(self.attention(x, *rest)))
        return self.norm_feedforward(x + self._drop(self.feedforward(x)))

    def _drop(self, x: Float[Tensor, "B Q d_model"]) -> Float[Tensor, "B Q d_model"]:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

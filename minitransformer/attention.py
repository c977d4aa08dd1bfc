"""Attention: every token asks (query), every token it may see answers (key, value).

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.

    Attention(Q, K, V) = softmax(Q Kᵀ / sqrt(d_head)) V                          equation 1
    MultiHead(x)       = Concat(head_1, …, head_H) W_O,   head_h = Attention(x W_Q[h], x W_K[h], x W_V[h])

Shapes:

    x [B, T, d_model]  ->  q [B, H, T, d_head],  k and v [B, H, S, d_head]  ->  output [B, T, d_model]

S, the number of keys, is T plus whatever stands in front: the tokens of earlier calls (a KV cache) and extra keys and
values that some other module brings. *A prefix is a learned KV cache*, so both enter by the same concatenation.

Differs from the paper: the linear maps have biases, as in GPT-2 and BERT; the d_model x d_model weights of all heads
are stored as one matrix.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.cache import LayerCache
from minitransformer.config import TransformerConfig


class CausalMask(Tensor):
    """A mask [1, 1, T, T] that is the triangle "each query sees the keys up to its own", and no other.

    It is read like any tensor, and must not be written to. What is made from it (a part of it, a wider one) is a plain
    tensor: it may be no triangle any more.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # as `nn.Parameter` does it


def attention_weights(
    q: Float[Tensor, "B H T d_head"],
    k: Float[Tensor, "B H S d_head"],
    mask: Bool[Tensor, "#B #H #T S"] | None = None,
) -> Float[Tensor, "B H T S"]:
    """softmax(Q Kᵀ / sqrt(d_head)): how much each query looks at each key. Rows sum to 1.

    `mask` is True where a query may look. Vaswani et al. 2017, equation 1 without V.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, H, T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


def written_out_attention(
    q: Float[Tensor, "B H T d_head"],
    k: Float[Tensor, "B H S d_head"],
    v: Float[Tensor, "B H S d_head"],
    mask: Bool[Tensor, "#B #H #T S"] | None = None,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "B H T d_head"], Float[Tensor, "B H T S"]]:
    """Scaled dot-product attention as the formula says it. Returns the output and the weights.

    Vaswani et al. 2017, equation 1; dropout falls on the weights, as in their released code.
    """
    weights = attention_weights(q, k, mask)
    return F.dropout(weights, dropout) @ v, weights


def fused_attention(
    q: Float[Tensor, "B H T d_head"],
    k: Float[Tensor, "B H S d_head"],
    v: Float[Tensor, "B H S d_head"],
    mask: Bool[Tensor, "#B #H #T S"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T d_head"]:
    """The same output from PyTorch's fused kernel, which never stores the [T, S] weights.

    Of a `CausalMask` it knows the triangle, and leaves out the blocks of scores that nobody may see.
    """
    if isinstance(mask, CausalMask):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    """Multi-head attention. Vaswani et al. 2017, section 3.2.2.

    Weights: `query`, `key`, `value`, `output`, each [d_model, d_model] with a bias [d_model].
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.d_model = config.d_model
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.implementation = config.attention
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, {self.implementation}"

    def split_heads(self, x: Float[Tensor, "B S d_model"]) -> Float[Tensor, "B H S d_head"]:
        """Cut the last axis into heads and put the heads before the positions."""
        return x.view(*x.shape[:2], self.n_heads, x.shape[2] // self.n_heads).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "B T d_model"],
        mask: Bool[Tensor, "#B 1 T S"] | None = None,
        cache: LayerCache | None = None,
        weights: list | None = None,
        asked: Int[Tensor, "B"] | None = None,
        extra_key: Float[Tensor, "*B n d_model"] | None = None,
        extra_value: Float[Tensor, "*B n d_model"] | None = None,
        extra_visible: Bool[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B Q d_model"]:
        """Attend from every position of x to x itself, to the cache, and to the extra keys.

        Args:
            x: the input, [B, T, d_model].
            mask: True where query t may look at key s; S counts cached tokens and x, not the extra keys.
                None lets every query see every key.
            cache: keys and values of earlier tokens; those of x are appended to it.
            weights: a list to which the attention weights [B, H, T, n + S] are appended, for pictures
                (this takes the written-out form).
            asked: one position for each row: only these have queries, and the output is [B, 1, d_model].
            extra_key, extra_value: n further keys and values before the split into heads: [n, d_model] for every row
                alike, or [B, n, d_model]. They stand in front, and are visible to every query.
            extra_visible: False where a row lacks an extra position, [B, n]; None: each row has them all.
        """
        q, mask = self.queries(x, mask, asked)
        return self.join_heads(self.attend(q, x, mask, cache, weights, extra_key, extra_value, extra_visible))

    def queries(
        self,
        x: Float[Tensor, "B T d_model"],
        mask: Bool[Tensor, "#B 1 T S"] | None = None,
        asked: Int[Tensor, "B"] | None = None,
    ) -> tuple[Float[Tensor, "B H Q d_head"], Bool[Tensor, "#B 1 Q S"] | None]:
        """The queries of all positions, or of the one that each row is asked for; and their lines of the mask."""
        if asked is not None and mask is not None:
            every = torch.arange(len(x), device=x.device)
            mask = mask.expand(len(x), -1, -1, -1)[every, :, asked][:, :, None]  # [B, 1, 1, S]
        return self.split_heads(self.query(x if asked is None else picked(x, asked))), mask

    def attend(
        self,
        q: Float[Tensor, "B H Q d_head"],
        x: Float[Tensor, "B T d_model"],
        mask: Bool[Tensor, "#B 1 Q S"] | None = None,
        cache: LayerCache | None = None,
        weights: list | None = None,
        extra_key: Float[Tensor, "*B n d_model"] | None = None,
        extra_value: Float[Tensor, "*B n d_model"] | None = None,
        extra_visible: Bool[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B H Q d_head"]:
        """What each head's queries `q` see in x and in what stands in front of it; the rest as in `forward`."""
        k, v = self.split_heads(self.key(x)), self.split_heads(self.value(x))
        if cache is not None:
            cache.append(k, v)
            k, v = cache.key, cache.value  # [B, H, S, d_head]
        if extra_key is not None:
            if extra_visible is not None:
                mask = _with_extra(extra_visible, mask, q.shape[2], k.shape[2])
            elif mask is not None:
                mask = F.pad(mask, (extra_key.shape[-2], 0), value=True)  # [B, 1, T, n + S]
            k = self._prepend(extra_key, k)  # [B, H, n + S, d_head]
            v = self._prepend(extra_value, v)
        dropout = self.dropout if self.training else 0.0
        if weights is None and self.implementation == "fused":
            return fused_attention(q, k, v, mask, dropout)
        out, seen = written_out_attention(q, k, v, mask, dropout)
        if weights is not None:
            weights.append(seen)
        return out

    def join_heads(self, heads: Float[Tensor, "B H Q d_head"]) -> Float[Tensor, "B Q d_model"]:
        """Concatenate the heads and mix them by W_O."""
        return self.output(heads.transpose(1, 2).flatten(-2))

    def _prepend(
        self, extra: Float[Tensor, "*B n d_model"], own: Float[Tensor, "B H S d_head"]
    ) -> Float[Tensor, "B H nS d_head"]:
        extra = self.split_heads(extra.to(own.dtype).expand(own.shape[0], -1, -1))  # [B, H, n, d_head]
        return torch.cat([extra, own], dim=2)


def picked(x: Float[Tensor, "B T d"], asked: Int[Tensor, "B"]) -> Float[Tensor, "B 1 d"]:
    """One position of each row."""
    return x[torch.arange(len(x), device=x.device), asked][:, None]


def _with_extra(
    visible: Bool[Tensor, "B n"], mask: Bool[Tensor, "#B 1 T S"] | None, n_queries: int, n_keys: int
) -> Bool[Tensor, "B 1 T nS"]:
    """The mask over the extra positions, which differ from row to row, and the text."""
    n_rows, n = visible.shape
    text = visible.new_ones(1, 1, n_queries, n_keys) if mask is None else mask
    extra = visible[:, None, None, :].expand(n_rows, 1, n_queries, n)
    return torch.cat([extra, text.expand(n_rows, 1, n_queries, n_keys)], dim=-1)


def attention_mask(
    n_queries: int, real_keys: Bool[Tensor, "B S"] | None, n_keys: int, causal: bool, device=None
) -> Bool[Tensor, "#B 1 T S"] | None:
    """Which query may look at which key: True = may look.

    The queries are the last `n_queries` of the `n_keys` positions. `real_keys` is False at padding. None means that
    nothing is hidden. A padded query still sees itself, so that its softmax has something to normalise: its output is
    ignored, but a NaN there would reach every gradient. A triangle and nothing else says so: it is a `CausalMask`.
    """
    if real_keys is None and (not causal or n_queries == 1):  # the newest of all may see all
        return None
    may_look = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if causal:
        may_look = may_look.tril(diagonal=n_keys - n_queries)
    may_look = may_look[None, None]  # [1, 1, T, S]
    if real_keys is None:
        triangle = n_queries == n_keys and not torch.compiler.is_compiling()  # torch.export knows no class of ours
        return may_look.as_subclass(CausalMask) if triangle else may_look
    keys = torch.arange(n_keys, device=device)
    is_self = keys == keys[n_keys - n_queries :, None]  # [T, S]
    return may_look & (real_keys[:, None, None, :] | is_self)  # [B, 1, T, S]

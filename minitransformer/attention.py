"""Attention: every token asks (query), every token it may see answers (key, value).

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.

    Attention(Q, K, V) = softmax(Q Kᵀ / sqrt(d_head)) V                          equation 1
    MultiHead(x)       = Concat(head_1, …, head_H) W_O,   head_h = Attention(x W_Q[h], x W_K[h], x W_V[h])

Shapes:

    x [B, T, d_model]  ->  q [B, H, T, d_head],  k and v [B, H_kv, S, d_head]  ->  output [B, T, d_model]

S, the number of keys, is T plus what a *context* brings: keys and values from elsewhere, such as those of earlier
tokens (a KV cache) or learned ones (a prefix). *A prefix is a learned KV cache*, so both enter in one way.

Keys and values may have fewer heads, H_kv, each for a group of queries' (Ainslie et al. 2023, "GQA", section 2.2).

Differs from the paper: the linear layers have biases where `config.bias` says so, as in GPT-2 and BERT all of them; the
weights of all heads are stored as one matrix.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from minitransformer.call import CALL, RECORDS, telling
from minitransformer.config import TransformerConfig

Hidden = Float[Tensor, "B T d_model"]
Queries = Float[Tensor, "B H T d_head"]  # and what they see
Keys = Float[Tensor, "B H_kv S d_head"]  # and values
# True where a query may look at a key; "causal": at keys up to its own, as many as queries; None: at all keys.
Mask = Bool[Tensor, "#B #H #T S"] | Literal["causal"] | None


class Context:
    """Keys and values from elsewhere, which a layer's queries see beside those of its input."""

    def attend(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """What the queries see in all keys and values: `attention(q, k, v, mask)` with the context's own added.

        Shapes: q [B, H, T, d_head], k and v [B, H_kv, S, d_head] -> [B, H, T, d_head].
        """
        raise NotImplementedError


def attention_weights(q: Queries, k: Keys, mask: Mask = None) -> Float[Tensor, "B H T S"]:
    """softmax(Q Kᵀ / sqrt(d_head)): how much each query looks at each key. Rows sum to 1.

    Vaswani et al. 2017, equation 1 without V.
    """
    scores = q @ of_each_query(k, q).transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, H, T, S]
    if mask is not None:
        scores = scores.masked_fill(~written_out(mask, k), -math.inf)
    return scores.softmax(dim=-1)


def written_out_attention(q: Queries, k: Keys, v: Keys, mask: Mask = None, dropout: float = 0.0) -> Queries:
    """Scaled dot-product attention as the formula says it.

    Vaswani et al. 2017, equation 1; dropout falls on the weights, as in their released code.
    """
    return F.dropout(attention_weights(q, k, mask), dropout) @ of_each_query(v, q)


def of_each_query(k: Keys, q: Queries) -> Float[Tensor, "B H S d_head"]:
    """The keys (or values) that each head of queries sees: H / H_kv heads in a row share one. Ainslie et al. 2023."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def fused_attention(q: Queries, k: Keys, v: Keys, mask: Mask = None, dropout: float = 0.0) -> Queries:
    """The same output from PyTorch's fused kernel, which never stores the [T, S] weights.

    It knows "causal", and leaves out the blocks of scores that nobody may see.
    """
    mask, causal = (None, True) if isinstance(mask, str) else (mask, False)
    grouped = {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, **grouped)


class Attention(nn.Module):
    """Multi-head attention. Vaswani et al. 2017, section 3.2.2.

    Weights: `query`, `key`, `value` [H d_head, d_model] and `output` [d_model, H d_head], with biases where
    `config.bias` says so.
    """

    rope_theta: float | None = None  # where positions are rotary: a context then turns queries and keys

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.d_model, self.n_heads = config.d_model, config.n_heads
        self.dropout, self.implementation = config.dropout, config.attention
        self.query = nn.Linear(config.d_model, config.n_heads * config.d_head, config.has_bias("query"))
        self.key = nn.Linear(config.d_model, config.d_kv, config.has_bias("key"))
        self.value = nn.Linear(config.d_model, config.d_kv, config.has_bias("value"))
        self.output = nn.Linear(config.n_heads * config.d_head, config.d_model, config.has_bias("output"))
        if config.position == "rotary":
            self.rope_theta = config.rope_theta

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, {self.implementation}"

    def forward(self, x: Hidden, mask: Mask = None, context: Context | None = None) -> Hidden:
        """Attend from every position of x to x itself, and to what the context brings.

        `mask` says where query t may look at key s; S counts x and the cached tokens of the context, but no prefix,
        which every query may see.
        """
        q, k, v = self.split_heads(self.query(x)), *self.keys_and_values(x)
        attend = self.attend if context is None else partial(context.attend, self.attend)
        return self.output(attend(q, k, v, mask).transpose(1, 2).flatten(-2))  # the heads side by side, mixed by W_O

    def keys_and_values(self, x: Float[Tensor, "B S d_model"]) -> tuple[Keys, Keys]:
        """What the positions of x answer."""
        return self.split_heads(self.key(x)), self.split_heads(self.value(x))

    def split_heads(self, x: Float[Tensor, "B S d"]) -> Keys:
        """Cut the last axis into heads and put the heads before the positions."""
        return x.view(*x.shape[:2], self.n_heads, x.shape[2] // self.n_heads).transpose(1, 2)

    def attend(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Scaled dot-product attention in the implementation that the config names."""
        for layers, weights in CALL.told.get(RECORDS, ()):
            if self in layers and torch._C._current_graph_task_id() == -1:  # no backward pass computes it again
                weights.append(attention_weights(q.detach(), k.detach(), mask))
        fused = self.implementation == "fused" and not is_transformed()
        attention = fused_attention if fused else written_out_attention
        return attention(q, k, v, mask, self.dropout if self.training else 0.0)


class GroupedQueryAttention(Attention):
    """Fewer heads for keys and values: `key` and `value` [H_kv d_head, d_model]. Ainslie et al. 2023, section 2.2."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.d_head, self.d_kv = config.d_head, config.d_kv

    def split_heads(self, x: Float[Tensor, "B S d"]) -> Keys:
        """Cut the last axis into heads, as many as it holds, and put the heads before the positions."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is at work on what is computed.

    Not all of them know a fused kernel, and values cannot be read: in `vmap` an example has none.
    """
    active = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return active and not torch.compiler.is_compiling()


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Float[Tensor, "B H T S"]]]:
    """Inside, every pass of this thread notes the attention weights of each layer, for pictures, in the list it gives.

    The weights are computed beside the pass, without dropout, by the written-out formula.
    """
    weights: list[Tensor] = []
    layers = {module for module in model.modules() if isinstance(module, Attention)}
    with telling({RECORDS: (*CALL.told.get(RECORDS, ()), (layers, weights))}):
        yield weights


def written_out(mask: Mask, k: Keys) -> Bool[Tensor, "#B #H #T S"] | None:
    """The mask as a tensor."""
    if not isinstance(mask, str):
        return mask
    return torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()[None, None]


def attention_mask(
    n_queries: int, real_keys: Bool[Tensor, "B S"] | None, n_keys: int, causal: bool, device=None
) -> Mask:
    """Which query may look at which key.

    The queries are the last `n_queries` of the `n_keys` positions. `real_keys` is False at padding. A padded query
    still sees itself, so that its softmax has something to normalise: its output is ignored, but a NaN there would
    reach every gradient.
    """
    if real_keys is None and (not causal or n_queries == 1):  # the newest of all may see all
        return None
    if real_keys is None and n_queries == n_keys:
        return "causal"
    may_look = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=device)
    may_look = may_look.tril(diagonal=n_keys - n_queries) if causal else may_look
    if real_keys is None:
        return may_look
    is_self = torch.eye(n_keys, dtype=torch.bool, device=device)[n_keys - n_queries :]  # [T, S]
    return may_look & (real_keys[:, None, None] | is_self)  # [B, 1, T, S]

"""Prefix tuning: n learned keys and values that every query of a layer may look at.

Source: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", sections 4.1 and 4.2; in the
form of He et al. 2022, equation 5.

    at="kv"       Attn(q, [P_k ; K], [P_v ; V])                    P_k, P_v [n, d_model] in every layer
    at="hidden"   P_k = P W_kᵀ + b_k,  P_v = P W_vᵀ + b_v          P [n, d_model] in front of every layer's input
    gated=True    Attn(q, K, V) + tanh(g) Attn(q, P_k, P_v)        g [H], 0 at the start; Zhang et al. 2023

*A prefix is a learned KV cache*: what the layer would remember of n words that were never written. It takes no part in
the positions of the text, and asks no query of its own. Gated (LLaMA-Adapter, section 3.2), it starts as the unchanged
model, which a plain prefix never does: even zero keys take their share of the softmax.

Shapes: P_k, P_v [n, d_model] -> [B, H, n, d_head] in front of [B, H, S, d_head]. Trained: 2 n d_model parameters per
layer for "kv", n d_model for "hidden". With grouped queries, P_k and P_v are [n, H_kv d_head].

Rotary positions do not turn it, and the text's still start at 0; the keys of real words to start from are turned to the
positions -n … -1, where they would lie in a cache.

Differs from the paper: "hidden" joins what W_k and W_v read (in a pre-norm block, after the norm); otherwise nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minitransformer.attention import Attention, Context, GroupedQueryAttention, Hidden, Mask
from minitransformer.config import TransformerConfig
from minitransformer.position import in_front
from peft.functional import gated_prefix, prefix_attention
from peft.method import KeysAndValues, LayerwiseMethod, Wrapper, dtype_of, normal, parameter_like, unwrapped
from peft.methods.options import one_of
from peft.methods.real_words import LearnedPositions
from peft.methods.reparameterization import made_by_mlp, mlp_start
from peft.sites import in_layers


@dataclass(frozen=True)
class PrefixTuning(LayerwiseMethod, LearnedPositions):
    """Recipe: a prefix of `length` positions in every layer's attention.

    Args:
        at: "kv" learns keys and values themselves; "hidden" learns inputs, from which the frozen W_k and W_v make them.
        init: "activations" starts from the keys and values (or inputs) that real words have in each layer; or "normal".
        length, init_std, init_tokens, layers: as in `LearnedPositions` and `LayerwiseMethod`.
        reparameterize: hidden width of the paper's MLP (`reparameterization.py`), which makes P_k and P_v in training,
            from a start of its own, and which `peft.fold` folds away; None trains P_k and P_v directly.
        gated: put a gate in front of the prefix that starts at zero, one for each head.

    Raises:
        ValueError: what `LearnedPositions` refuses, or a width below 1, or with options that the MLP would ignore.
    """

    init: one_of("activations", "normal") = "activations"
    at: one_of("kv", "hidden") = "kv"
    reparameterize: int | None = None
    gated: bool = False

    def __post_init__(self):
        super().__post_init__()
        mlp, ignored = self.reparameterize, self.init == "normal" or self.init_tokens is not None
        if mlp is not None and (mlp < 1 or self.at != "kv" or ignored):
            start = "init and init_tokens would be ignored: the MLP has a start of its own"
            raise ValueError(f'reparameterize is a width of at least 1, and goes with at="kv"; {start}')

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """Every attention layer."""
        return in_layers([n for n, module in modules.items() if isinstance(module, Attention)], modules, self.layers)

    def wrap(self, name: str, module: Attention, model: nn.Module, generator: torch.Generator) -> "PrefixAttention":
        gate = {"gate": torch.zeros(module.n_heads)} if self.gated else {}
        return PrefixAttention(module, self, self.start(module, model, generator) | gate)

    def start(self, attention: Attention, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """The prefix of one layer, or what makes it, at the start of training."""
        n, d, d_kv = self.length, attention.d_model, unwrapped(attention.value).out_features
        if self.reparameterize is not None:
            return mlp_start(d, n, self.reparameterize, generator, d_kv)
        parts = {"key": d_kv, "value": d_kv} if self.at == "kv" else {"hidden": d}
        if self.init == "normal":
            return {part: normal((n, width), self.init_std, generator) for part, width in parts.items()}
        hidden = self.activations(attention, model, generator)
        if self.at == "hidden":
            return {"hidden": hidden[0]}
        key, value = (unwrapped(getattr(attention, part))(hidden) for part in parts)
        return {"key": in_front(attention, key)[0], "value": value[0]}

    def expected_parameters(self, config: TransformerConfig) -> int:
        """blocks * 2 n d ("kv") or n d ("hidden"), and a gate per head; with the MLP, what is trained before `fold`."""
        n, d, d_kv, h = self.length, config.d_model, config.d_kv, self.reparameterize
        per_block = 2 * n * d_kv if self.at == "kv" else n * d
        per_block = per_block if h is None else n * d + (h * d + h) + 2 * (d_kv * h + d_kv)
        return self.n_blocks(config) * (per_block + self.gated * config.n_heads)


class PrefixAttention(Wrapper):
    """Attention with `key` and `value` [n, d_model] in front, or what makes them (`hidden`, an MLP); and `gate` [H]."""

    order = 0
    position_wise = True

    def __init__(self, base: Attention, recipe: PrefixTuning, start: dict[str, Tensor]):
        super().__init__(base)
        self.recipe = recipe
        for name, values in start.items():
            self.register_parameter(name, parameter_like(values, base))

    def prefix(self) -> tuple[Float[Tensor, "n d_kv"], Float[Tensor, "n d_kv"]]:
        """P_k and P_v, computed afresh in every pass: a stored result would cut the gradient."""
        if self.recipe.reparameterize is not None:
            return made_by_mlp(self.tensors())
        if self.recipe.at == "kv":
            return self.key, self.value
        frozen, hidden = unwrapped(self.base), self.hidden[None]  # as a layer's input is, for hooks on W_k and W_v
        key, value = (part(hidden.to(dtype_of(part)))[0] for part in (frozen.key, frozen.value))
        return key, value

    def forward(self, x: Hidden, mask: Mask = None, context: Context | None = None) -> Hidden:
        """Attention over [P_k ; K] and [P_v ; V]: the frozen layer, with the prefix as its context."""
        if not self.enabled:
            return self.base(x, mask, context)
        split = unwrapped(self.base).split_heads
        key, value = (split(part[None]) for part in self.prefix())  # [1, H, n, d_head]
        return self.base(x, mask, PrefixContext(key, value, context, gate=self.gate if self.recipe.gated else None))

    def as_attention(self) -> tuple[Attention, KeysAndValues | None] | None:
        """The frozen layer and P_k, P_v; None for what is more than keys and values in front."""
        if type(self.base) not in (Attention, GroupedQueryAttention) or (self.enabled and self.recipe.gated):
            return None
        return self.base, self.prefix() if self.enabled else None


@dataclass
class PrefixContext(Context):
    """P_k and P_v in front of all that a layer sees anyway: its input, and what `behind` brings."""

    key: Float[Tensor, "#B H_kv n d_head"]
    value: Float[Tensor, "#B H_kv n d_head"]
    behind: Context | None = None  # another context, such as a KV cache
    gate: Float[Tensor, " H"] | None = None  # one for each head: the prefix then has a softmax of its own
    visible: Bool[Tensor, "B n"] | None = None  # False where a row lacks a position

    def attend(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """As `Context.attend`: the tokens behind first, the prefix in front of them."""
        with_prefix = partial(self.with_prefix, attention)
        return with_prefix(q, k, v, mask) if self.behind is None else self.behind.attend(with_prefix, q, k, v, mask)

    def with_prefix(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attention over the prefix and all keys; gated, in the precision of the gate."""
        dtype = k.dtype if self.gate is None else self.gate.dtype
        key, value = (part.to(dtype).expand(len(q), -1, -1, -1) for part in (self.key, self.value))
        if self.gate is None:
            return prefix_attention(q, k, v, key, value, mask, attention, self.visible)
        own = attention(q, k, v, mask)
        return gated_prefix(own.to(dtype), q.to(dtype), key, value, self.gate).to(own.dtype)

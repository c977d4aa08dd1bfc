"""Prefix tuning: n learned keys and values that every query of a layer may look at.

Source: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", sections 4.1 and 4.2; the
concatenated form of He et al. 2022, equation 5.

    at="kv"       Attention(q, [P_k ; K], [P_v ; V])               P_k, P_v [n, d_model] in every layer
    at="hidden"   P_k = P W_kᵀ + b_k,  P_v = P W_vᵀ + b_v          P [n, d_model] in front of every layer's input

*A prefix is a learned KV cache*: what the layer would remember of n words that were never written. It takes no part in
the positions of the text, and asks no query of its own.

Shapes: P_k, P_v [n, d_model] -> [B, H, n, d_head] in front of [B, H, S, d_head]. Trained: 2 n d_model parameters per
layer for "kv", n d_model for "hidden". Where keys and values have fewer heads, P_k and P_v are [n, H_kv d_head].

Rotary positions do not turn it, and the text's still start at 0; the keys of real words to start from are turned to the
positions -n … -1, where they would lie in a cache.

With `gated=True` the prefix has a softmax of its own, and each head a gate g that starts at zero (Zhang et al. 2023,
"LLaMA-Adapter", section 3.2): Attn(q, K, V) + tanh(g) Attn(q, P_k, P_v). Then the start *is* the unchanged model, which
a plain prefix never is: even zero keys take their share of the softmax.

Differs from the paper: "hidden" joins what W_k and W_v read (in a pre-norm block, after the norm); otherwise nothing.
The paper's MLP is in `peft/methods/reparameterization.py`, the start from real words in `peft/methods/real_words.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minitransformer.attention import Attention, Context, Mask
from minitransformer.config import TransformerConfig
from minitransformer.position import in_front
from peft.functional import gated_prefix, prefix_attention
from peft.method import (
    KeysAndValues,
    LayerwiseMethod,
    Wrapper,
    dtype_of,
    normal,
    parameter_like,
    unwrapped,
)
from peft.methods.real_words import attention_input_of_words, check_start
from peft.methods.reparameterization import made_by_mlp, mlp_start
from peft.sites import in_layers


@dataclass(frozen=True)
class PrefixTuning(LayerwiseMethod):
    """Recipe: a prefix of `length` positions in every layer's attention.

    Args:
        length: n, the number of prefix positions.
        at: "kv" learns keys and values themselves; "hidden" learns inputs, from which the frozen W_k and W_v make them.
        init: "activations" starts from the keys and values (or inputs) that `length` real words have in each layer;
            "normal" from N(0, init_std²).
        init_std: standard deviation of "normal".
        init_tokens: the words of "activations", `length` word numbers; None draws them from the whole vocabulary.
        reparameterize: hidden width of the MLP that stands in for P_k and P_v while they are trained (at="kv" only; it
            brings its own initialisation) and is folded away by `peft.fold`; None trains P_k and P_v directly.
        gated: put a gate in front of the prefix that starts at zero, one for each head.
        layers: the numbers of the blocks to enter; None means all.

    Raises:
        ValueError: a length below 1, an unknown choice, a negative `init_std`, `init_tokens` of another length, an
            option that would be ignored.
    """

    length: int = 8
    at: str = "kv"
    init: str = "activations"
    init_std: float | int = 1.0
    init_tokens: tuple[int, ...] | None = None
    reparameterize: int | None = None
    gated: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_start(self, "activations")
        if self.at not in ("kv", "hidden"):
            raise ValueError(f'at={self.at!r} is unknown; choose "kv" or "hidden"')
        if self.reparameterize is None:
            return
        if self.reparameterize < 1 or self.at != "kv":
            raise ValueError('reparameterize is a width of at least 1, and goes with at="kv"')
        if self.init != "activations" or self.init_tokens is not None:
            raise ValueError("init and init_tokens would be ignored: the MLP of reparameterize has a start of its own")

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """Every attention layer."""
        names = [name for name, module in modules.items() if isinstance(module, Attention)]
        return in_layers(names, modules, self.layers)

    def wrap(self, name: str, module: Attention, model: nn.Module, generator: torch.Generator) -> Wrapper:
        """A `PrefixAttention` round the layer."""
        d, d_kv = module.d_model, unwrapped(module.key).out_features
        if self.reparameterize is not None:
            return PrefixAttention(module, self, mlp_start(d, self.length, self.reparameterize, generator, d_kv))
        parts = ("key", "value") if self.at == "kv" else ("hidden",)
        if self.init == "normal":
            shape = (self.length, d if self.at == "hidden" else d_kv)
            return PrefixAttention(module, self, {part: normal(shape, self.init_std, generator) for part in parts})
        hidden = attention_input_of_words(self, module, model, generator)
        with torch.no_grad():
            key, value = in_front(module, unwrapped(module.key)(hidden)), unwrapped(module.value)(hidden)
        known = {"hidden": hidden, "key": key, "value": value}
        return PrefixAttention(module, self, {part: known[part][0] for part in parts})

    def expected_parameters(self, config: TransformerConfig) -> int:
        """blocks * 2 n d ("kv") or n d ("hidden"), and a gate per head; with the MLP, what is trained before `fold`."""
        n, d, d_kv, h = self.length, config.d_model, config.d_kv, self.reparameterize
        per_block = 2 * n * d_kv if self.at == "kv" else n * d
        per_block = per_block if h is None else n * d + (h * d + h) + 2 * (d_kv * h + d_kv)
        return self.n_blocks(config) * (per_block + self.gated * config.n_heads)


class PrefixAttention(Wrapper):
    """Attention with `key` and `value` [n, d_model] in front, or what makes them: `hidden` [n, d_model], or an MLP's
    tensors; and `gate` [H]."""

    order = 0
    position_wise = True

    def __init__(self, base: Attention, recipe: PrefixTuning, start: dict[str, Float[Tensor, "n d_model"]]):
        super().__init__(base)
        self.recipe = recipe
        for name, values in start.items():
            self.register_parameter(name, parameter_like(values, base))
        if recipe.gated and "gate" not in start:
            self.gate = parameter_like(torch.zeros(base.n_heads), base)

    def prefix(self) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
        """P_k and P_v. Computed afresh in every pass: a stored result would cut the gradient."""
        if self.recipe.reparameterize is not None:
            return made_by_mlp(self.tensors())
        if self.recipe.at == "kv":
            return self.key, self.value
        frozen = unwrapped(self.base)
        hidden = self.hidden[None]  # as a layer's input is, for hooks on W_k and W_v
        key, value = (part(hidden.to(dtype_of(part)))[0] for part in (frozen.key, frozen.value))
        return key, value

    def forward(
        self, x: Float[Tensor, "B T d_model"], mask: Mask = None, context: Context | None = None
    ) -> Float[Tensor, "B T d_model"]:
        """Attention over [P_k ; K] and [P_v ; V]: the frozen layer, with the prefix as its context."""
        if not self.enabled:
            return self.base(x, mask, context)
        split = unwrapped(self.base).split_heads
        key, value = (split(part[None]) for part in self.prefix())  # [1, H, n, d_head]
        return self.base(x, mask, PrefixContext(key, value, context, gate=self.gate if self.recipe.gated else None))

    def as_attention(self) -> tuple[Attention, KeysAndValues | None] | None:
        """The frozen layer and P_k, P_v; None for what is more than keys and values in front."""
        if type(self.base) is not Attention or (self.enabled and self.recipe.gated):
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

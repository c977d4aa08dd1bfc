"""Adapters: a small bottleneck network added to what a frozen sublayer computes.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1 and figure 2.

    bottleneck(h) = W_up act(W_down h + b_down) + b_up

    placement="houlsby"      y = h + bottleneck(h),  h = sublayer(x)      after attention and after the FFN
    placement="pfeiffer"     the same after the FFN only                  Pfeiffer et al. 2021, section 3.2.1
    placement="parallel"     y = ffn(x) + scale * bottleneck(x)           He et al. 2022, section 3.3
    placement="inside_ffn"   y = W2 (h + bottleneck(h)),  h = act(W1 x)   between the two linear layers of the FFN

Shapes: h [..., d], W_down [m, d], b_down [m], W_up [d, m], b_up [d]; d = d_model, for "inside_ffn" d = d_ff.
Trained: 2 d m + m + d parameters per adapter. The sum with h is the adapter's own residual; the block's comes after it.

Differs from the papers: W_up and b_up start at exactly 0, so that the model is unchanged at the start (Houlsby draws
W_up from N(0, 0.01²)); the block's LayerNorms stay frozen, which Houlsby trains; Pfeiffer's extra one is left out.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.attention import Attention
from minitransformer.config import ACTIVATIONS, TransformerConfig
from minitransformer.feedforward import FeedForward
from peft.functional import bottleneck, in_their_precision
from peft.method import LayerwiseMethod, Wrapper, normal, parameter_like, unwrapped
from peft.methods.options import Count, Factor, one_of
from peft.sites import block_names, in_layers

# What each placement wraps in a block, and how the wrapper joins it: behind it, beside it, or in front of it.
PLACEMENTS = {
    "houlsby": (("attention", "feedforward"), "after"),
    "pfeiffer": (("feedforward",), "after"),
    "parallel": (("feedforward",), "parallel"),
    "inside_ffn": (("feedforward.down",), "before"),
}


@dataclass(frozen=True)
class BottleneckAdapter(LayerwiseMethod):
    """Recipe: adapters of width `bottleneck` in every block.

    Args:
        bottleneck: m, the width between the two projections.
        placement: "houlsby" | "pfeiffer" | "parallel" | "inside_ffn", see the head of this file.
        activation: "relu" | "gelu" | "gelu_tanh" | "silu".
        scale: factor on the bottleneck's output (the s of He et al. 2022; 1 in Houlsby et al. 2019).
        layers: the numbers of the blocks to enter; None means all.
    """

    bottleneck: Count = 8
    placement: one_of(*PLACEMENTS) = "houlsby"
    activation: one_of(*ACTIVATIONS) = "relu"
    scale: Factor = 1.0

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """The sublayers (or the FFN's second linear layer) of every block."""
        places = [f"{block}.{place}" for block in block_names(modules) for place in PLACEMENTS[self.placement][0]]
        return in_layers(places, modules, self.layers)

    def wrap(self, name: str, module: nn.Module, model: nn.Module, generator: torch.Generator) -> "Adapter":
        inside = module.up if isinstance(module, FeedForward) else module
        reader = unwrapped(module.query if isinstance(module, Attention) else inside)
        if not isinstance(reader, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}, of which an adapter does not know the width")
        return Adapter(module, self, reader.in_features, generator)

    def expected_parameters(self, config: TransformerConfig) -> int:
        """blocks * adapters per block * (2 d m + m + d)."""
        d, m = config.d_ff if self.placement == "inside_ffn" else config.d_model, self.bottleneck
        return self.n_blocks(config) * len(PLACEMENTS[self.placement][0]) * (2 * d * m + m + d)


class Joined(Wrapper):
    """A bottleneck behind, beside or in front of a frozen module: `joined` says where, `added(h)` what it adds to h."""

    order = 3
    joined: str

    def forward(self, x: Float[Tensor, "*rows d_in"], *rest) -> Float[Tensor, "*out d_out"]:
        """The wrapped module with the bottleneck joined; further arguments are the wrapped module's."""
        if not self.enabled:
            return self.base(x, *rest)
        if self.joined == "before":
            return self.base(x + self.added(x))
        h = self.base(x, *rest)
        return h + self.added(h if self.joined == "after" else x)


class Adapter(Joined):
    """The bottleneck with explicit `down_weight`, `down_bias`, `up_weight` and `up_bias`."""

    position_wise = True

    def __init__(self, base: nn.Module, recipe: BottleneckAdapter, d: int, generator: torch.Generator):
        super().__init__(base)
        self.recipe, (_, self.joined), m = recipe, PLACEMENTS[recipe.placement], recipe.bottleneck
        self.down_weight = parameter_like(normal((m, d), 1 / math.sqrt(d), generator), base)
        self.down_bias = parameter_like(torch.zeros(m), base)
        self.up_weight = parameter_like(torch.zeros(d, m), base)
        self.up_bias = parameter_like(torch.zeros(d), base)

    def added(self, h: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Houlsby et al. 2019, section 2.1."""
        tensors = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        return in_their_precision(bottleneck, h, *tensors, self.recipe.activation, self.recipe.scale)

    def extra_repr(self) -> str:
        m, d = self.down_weight.shape
        return f"{d} -> {m} -> {d}, {self.recipe.activation}, joined {self.joined}"

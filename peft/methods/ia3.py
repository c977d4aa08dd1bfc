"""IA3: three vectors per block that inhibit and amplify inner activations.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
section 3.3.

    Attention(Q, l_k ⊙ K, l_v ⊙ V)              W_down (l_ff ⊙ act(W_up x))            l = 1 at the start

Shapes: l_k, l_v [d_model] (with grouped queries H_kv d_head), l_ff [d_ff]. Trained: 2 d_model + d_ff
parameters per block, about as many as a LoRA of rank 1 on a single layer.

Differs from the paper: nothing. (Keys and values are scaled with their bias, as there.)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from peft.functional import in_their_precision, rescaled
from peft.method import LayerwiseMethod, LinearMap, Wrapper, can_hold, linear_map, parameter_like
from peft.sites import block_names, in_layers

# What is wrapped in each block, and on which side of it the vector lies.
PLACES = {"attention.key": "output", "attention.value": "output", "feedforward.down": "input"}


@dataclass(frozen=True)
class IA3(LayerwiseMethod):
    """Recipe: a scale for the keys, the values and the hidden layer of the FFN, in the blocks that `layers` names."""

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """The key layer, the value layer and the FFN's second layer of every block."""
        places = [f"{block}.{place}" for block in block_names(modules) for place in PLACES]
        return in_layers(places, modules, self.layers)

    def wrap(self, name: str, module: nn.Linear, model: nn.Module, generator: torch.Generator) -> "Rescaled":
        return Rescaled(module, PLACES[".".join(name.split(".")[-2:])])

    def expected_parameters(self, config: TransformerConfig) -> int:
        """blocks * (2 d_kv + d_ff), where d_kv = H_kv d_head, d_model without grouped queries."""
        return self.n_blocks(config) * (2 * config.d_kv + config.d_ff)


class Rescaled(Wrapper):
    """A linear layer with an explicit vector `scale` on its output [d_out] or on its input [d_in]."""

    order = 1
    position_wise = True

    def __init__(self, base: nn.Linear, side: str):
        super().__init__(base)
        self.side = side
        self.scale = parameter_like(torch.ones(base.out_features if side == "output" else base.in_features), base)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Liu et al. 2022, section 3.3."""
        if not self.enabled:
            return self.base(x)
        if self.side == "input":
            return self.base(in_their_precision(rescaled, x, self.scale))
        return in_their_precision(rescaled, self.base(x), self.scale)

    def as_linear(self) -> LinearMap | None:
        """W with scaled rows (and b) or columns, if its precision can hold the change."""
        base = linear_map(self.base)
        if not self.enabled or base is None:
            return base
        weight, bias = base
        if not can_hold(weight, self.scale):
            return None
        if self.side == "input":
            return weight * self.scale, bias
        return weight * self.scale[:, None], None if bias is None else bias * self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()} on its {self.side}"

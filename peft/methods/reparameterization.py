"""Li & Liang's reparameterisation: while it is trained, the prefix is the output of a small network.

Source: Li & Liang 2021, section 4.3 and appendix C: P_k and P_v trained directly were unstable for them, so

    P = tanh(P' W_hᵀ + b_h) W_oᵀ + b_o                P' [n, d_model] -> hidden [n, h] -> P_k, P_v [n, d_model]

is trained instead; afterwards P' and the network are thrown away and P_k, P_v stay. `fold` does that.

Differs from the paper: each layer has its own P' and hidden layer, where the paper shares one for all layers (its
output layer, the largest part, is as wide in sum).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.attention import Attention
from peft.functional import prefix_mlp
from peft.method import normal, uniform
from peft.methods.prefix import PrefixAttention, PrefixTuning


class ReparameterizedPrefixAttention(PrefixAttention):
    """A `PrefixAttention` whose P_k and P_v come from `source` [n, d_model] through an MLP."""

    as_attention = PrefixAttention.as_attention

    def __init__(self, base: Attention, recipe: PrefixTuning, generator: torch.Generator):
        d, h = base.d_model, recipe.reparameterize
        start = {
            "source": normal((recipe.length, d), 1.0, generator),
            "hidden_weight": uniform((h, d), 1 / math.sqrt(d), generator),
            "hidden_bias": torch.zeros(h),
            "key_weight": uniform((d, h), 1 / math.sqrt(h), generator),
            "key_bias": torch.zeros(d),
            "value_weight": uniform((d, h), 1 / math.sqrt(h), generator),
            "value_bias": torch.zeros(d),
        }
        super().__init__(base, recipe, start)

    def prefix(self) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
        """P_k and P_v, as the network makes them."""
        hidden = (self.source, self.hidden_weight, self.hidden_bias)
        key = prefix_mlp(*hidden, self.key_weight, self.key_bias)
        return key, prefix_mlp(*hidden, self.value_weight, self.value_bias)

    def folded(self, recipe: PrefixTuning) -> PrefixAttention:
        """The plain `PrefixAttention` with the P_k and P_v that the network makes now."""
        with torch.no_grad():
            key, value = self.prefix()
        kept = {"gate": self.gate.detach()} if recipe.gated else {}
        plain = PrefixAttention(self.base, recipe, {"key": key, "value": value, **kept})
        plain.training = self.training
        return plain

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

from peft.functional import prefix_mlp
from peft.method import normal, uniform


def mlp_start(d: int, n: int, h: int, generator: torch.Generator, d_kv: int) -> dict[str, Tensor]:
    """P' and the network's weights and biases at the start of training: d_model = d, n positions, hidden width h; keys
    and values are d_kv wide."""
    return {
        "source": normal((n, d), 1.0, generator),
        "hidden_weight": uniform((h, d), 1 / math.sqrt(d), generator),
        "hidden_bias": torch.zeros(h),
        "key_weight": uniform((d_kv, h), 1 / math.sqrt(h), generator),
        "key_bias": torch.zeros(d_kv),
        "value_weight": uniform((d_kv, h), 1 / math.sqrt(h), generator),
        "value_bias": torch.zeros(d_kv),
    }


def made_by_mlp(tensors: dict[str, Tensor]) -> tuple[Float[Tensor, "n d_kv"], Float[Tensor, "n d_kv"]]:
    """P_k and P_v from the tensors that `mlp_start` named."""
    hidden = [tensors[name] for name in ("source", "hidden_weight", "hidden_bias")]
    key, value = ((tensors[f"{part}_weight"], tensors[f"{part}_bias"]) for part in ("key", "value"))
    return prefix_mlp(*hidden, *key), prefix_mlp(*hidden, *value)

"""Li & Liang's reparameterisation: while it is trained, the prefix is the output of a small network.

Source: Li & Liang 2021, section 4.3 and appendix C: P_k and P_v trained directly were unstable for them, so

    P = tanh(P' W_hᵀ + b_h) W_oᵀ + b_o                P' [n, d_model] -> hidden [n, h] -> P_k, P_v [n, d_kv]

is trained instead; afterwards `fold` throws P' and the network away, and P_k, P_v stay.

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
    """P' [n, d] and the network's weights and biases at the start: hidden width h, keys and values d_kv wide."""
    start = {"source": normal((n, d), 1.0, generator)}
    for layer, d_out, d_in in (("hidden", h, d), ("key", d_kv, h), ("value", d_kv, h)):
        start[f"{layer}_weight"] = uniform((d_out, d_in), 1 / math.sqrt(d_in), generator)
        start[f"{layer}_bias"] = torch.zeros(d_out)
    return start


def made_by_mlp(tensors: dict[str, Tensor]) -> tuple[Float[Tensor, "n d_kv"], Float[Tensor, "n d_kv"]]:
    """P_k and P_v from the tensors that `mlp_start` named."""
    hidden = [tensors[name] for name in ("source", "hidden_weight", "hidden_bias")]
    key, value = ((tensors[f"{part}_weight"], tensors[f"{part}_bias"]) for part in ("key", "value"))
    return prefix_mlp(*hidden, *key), prefix_mlp(*hidden, *value)

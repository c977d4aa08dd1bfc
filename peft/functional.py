"""The arithmetic of every method, as pure functions of explicit tensors.

No module, no state: what a method *computes* is here, what it *is made of* is in its own file. The wrappers call these
functions (but for `gated_attention`, another way to write `prefix_attention`), and the tests hold each against a NumPy
twin, value and gradient. A method added in one file, as VeRA is, has its functions there.

Shapes: `[out, in]` for weights, `y = x Wᵀ + b`; d = d_model, n = prefix length, r = rank, m = bottleneck width.

In this order: LoRA, DoRA, a prefix (concatenated, as a mixture, gated, from an MLP), a prompt, adapters, IA3, BitFit,
LN-tuning.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from minitransformer.attention import Mask, fused_attention, of_each_query, written_out, written_out_attention
from minitransformer.feedforward import activate

Inputs, Outputs = Float[Tensor, "*rows d_in"], Float[Tensor, "*rows d_out"]
Weight, OutputVector = Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]
FactorA, FactorB = Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]
Hidden, HiddenVector = Float[Tensor, "*rows d"], Float[Tensor, " d"]
Queries, Keys = Float[Tensor, "B H T d_head"], Float[Tensor, "B H_kv S d_head"]
PrefixKeys = Float[Tensor, "B H_kv n d_head"]


def lora_update(x: Inputs, A: FactorA, B: FactorB, scale: float | int) -> Outputs:
    """scale * B A x, by two thin products: what LoRA adds to W0 x. Hu et al. 2022, equation 3; scale = alpha / r."""
    return scale * F.linear(F.linear(x, A), B)


def lora_weight(A: FactorA, B: FactorB, scale: float | int) -> Weight:
    """ΔW = scale * B A: the same update as a change of the weight. Hu et al. 2022, section 4.1."""
    with without_autocast(A):  # which would round it to 16 bits, and every token by it
        return scale * (B @ A)


def row_norms(weight: Weight) -> OutputVector:
    """The length of each row of a weight: of what makes one number of the output."""
    return torch.linalg.vector_norm(weight, dim=1)


def dora_weight(
    frozen_weight: Weight, A: FactorA, B: FactorB, magnitude: OutputVector, norms: OutputVector, scale: float | int
) -> Weight:
    """magnitude * (W0 + ΔW) / ||W0 + ΔW||: LoRA turns the direction of each row, `magnitude` is its length.

    Liu et al. 2024, equation 5. `norms`, the lengths of those rows, take no part in the gradient (section 4.3).
    """
    return (magnitude / norms)[:, None] * (frozen_weight + lora_weight(A, B, scale))


def prefix_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    prefix_k: PrefixKeys,
    prefix_v: PrefixKeys,
    mask: Mask = None,
    attention: Callable[..., Tensor] = fused_attention,
    visible: Bool[Tensor, "B n"] | None = None,
) -> Queries:
    """Attention over [P_k ; K] and [P_v ; V]: every query may also look at the n prefix positions.

    Li & Liang 2021, section 4.2, in the form of He et al. 2022, equation 5. `mask` is about K alone: no query is
    kept from the prefix, unless a row lacks a position (`visible` is False).
    """
    n = prefix_k.shape[2]
    if mask is not None:
        mask = F.pad(written_out(mask, k), (n, 0), value=True)  # [B, 1, T, n + S]
    if visible is not None:
        mask = F.pad(visible, (0, k.shape[2]), value=True)[:, None, None] & (True if mask is None else mask)
    return attention(q, torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2), mask)


def gated_attention(
    q: Queries, k: Keys, v: Keys, prefix_k: PrefixKeys, prefix_v: PrefixKeys, mask: Mask = None
) -> tuple[Queries, Float[Tensor, "B H T 1"]]:
    """The same output as a mixture, (1 - lambda) Attn(q, K, V) + lambda Attn(q, P_k, P_v), and its gate lambda.

    lambda is the share of the softmax's mass that falls on the prefix. He et al. 2022, equation 7.
    """
    k, v, prefix_k, prefix_v = (of_each_query(part, q) for part in (k, v, prefix_k, prefix_v))
    scores, prefix_scores = (q @ keys.mT / math.sqrt(q.shape[-1]) for keys in (k, prefix_k))  # [B, H, T, S], […, n]
    if mask is not None:
        scores = scores.masked_fill(~written_out(mask, k), -math.inf)
    gate = torch.sigmoid(prefix_scores.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True))
    own, front = scores.softmax(dim=-1) @ v, prefix_scores.softmax(dim=-1) @ prefix_v
    return (1 - gate) * own + gate * front, gate


def gated_prefix(
    own: Queries, q: Queries, prefix_k: PrefixKeys, prefix_v: PrefixKeys, gate: Float[Tensor, " H"]
) -> Queries:
    """own + tanh(gate) Attn(q, P_k, P_v): the prefix has a softmax of its own, and each head a gate for it.

    Zhang et al. 2023, section 3.2; the tanh is in their code. Where it is 0, `own`, the attention over the text, stays.
    """
    return own + torch.tanh(gate)[:, None, None] * written_out_attention(q, prefix_k, prefix_v)


def prefix_mlp(
    source: Float[Tensor, "n d"],
    hidden_weight: Float[Tensor, "h d"],
    hidden_bias: Float[Tensor, "h"],
    out_weight: Float[Tensor, "d_out h"],
    out_bias: Float[Tensor, "d_out"],
) -> Float[Tensor, "n d_out"]:
    """P = MLP(P'): the prefix as the output of a small network. Li & Liang 2021, section 4.3."""
    return F.linear(torch.tanh(F.linear(source, hidden_weight, hidden_bias)), out_weight, out_bias)


def prepend(prompt: Float[Tensor, "*rows n d"], vectors: Float[Tensor, "B T d"]) -> Float[Tensor, "B nT d"]:
    """[P ; E]: n vectors in front of every row, the same ones or its own. Lester et al. 2021, section 2."""
    return torch.cat([prompt.to(vectors.dtype).expand(vectors.shape[0], -1, -1), vectors], dim=1)


def bottleneck(
    h: Hidden,
    down_weight: Float[Tensor, "m d"],
    down_bias: Float[Tensor, "m"],
    up_weight: Float[Tensor, "d m"],
    up_bias: HiddenVector,
    activation: str = "relu",
    scale: float | int = 1.0,
) -> Hidden:
    """scale * (W_up act(W_down h + b_down) + b_up): what an adapter adds to h.

    Houlsby et al. 2019, section 2.1, where the scale is 1; it is the s of He et al. 2022, table 6.
    """
    return scale * F.linear(activate(F.linear(h, down_weight, down_bias), activation), up_weight, up_bias)


def rescaled(h: Hidden, scale: HiddenVector) -> Hidden:
    """l ⊙ h: each number of an activation has a learned factor. Liu et al. 2022, section 3.3."""
    return h * scale


def shifted(h: Hidden, delta_bias: HiddenVector) -> Hidden:
    """h + Δb: the change of a bias, added to what the frozen layer gives. Ben Zaken et al. 2022, section 3."""
    return h + delta_bias


def gain_update(x: Hidden, delta_gain: HiddenVector, eps: float | None, centred: bool = True) -> Hidden:
    """Δg ⊙ x̂: what the change of a norm's gain adds to its output. Qi et al. 2022.

    x̂ is x with variance 1 and, if `centred` as in LayerNorm, mean 0; RMSNorm leaves the mean where it is.
    """
    normalized = F.layer_norm if centred else F.rms_norm
    return normalized(x, delta_gain.shape, delta_gain, eps=eps)


def in_their_precision(function: Callable[..., Tensor], h: Tensor, *tensors) -> Tensor:
    """function(h, *tensors), computed in the precision of a method's tensors and given back in that of h."""
    return function(h.to(tensors[0].dtype), *tensors).to(h.dtype)


def without_autocast(like: Tensor) -> AbstractContextManager:
    """Inside, products are computed in the precision of their factors, on the device of `like`."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()

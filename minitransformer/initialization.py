"""Fresh weights: where training starts from.

Two ways, chosen by `TransformerConfig.init`:

    "gpt2"            Radford et al. 2019, section 2.3: every weight N(0, 0.02²); the two matrices that write to the
                      residual stream (attention.output, feedforward.down) are divided by sqrt(2 n_layers), one for each
                      sum on the way, so that the stream's variance does not grow with depth.
    "unit_embedding"  token embeddings N(0, 1), linear weights N(0, 1 / fan_in), positions from the sinusoids of
                      Vaswani et al. 2017, section 3.5. With logits scaled by 1 / sqrt(d_model), every vector of the
                      network starts at about unit variance; a small model learns fast from there.

Biases start at 0, LayerNorms at gain 1 and bias 0. The draws come from a generator of their own, on the CPU: the
caller's random states are left alone, and the same seed gives the same weights on every device.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

RESIDUAL_WRITERS = ("attention.output", "feedforward.down")


@torch.no_grad()
def initialize(model: nn.Module, init: str, n_layers: int, seed: int) -> None:
    """Overwrite every weight of `model`, in the order of `named_modules()`.

    Args:
        model: a Transformer (or any module made of linear layers, embeddings and norms).
        init: "gpt2" or "unit_embedding".
        n_layers: how many blocks write to the residual stream; scales "gpt2".
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        for part, p in module.named_parameters(recurse=False):
            if p.is_meta:
                continue
            if p.ndim == 1:  # a bias, or the gain of a norm
                p.fill_(0.0 if part == "bias" else 1.0)
                continue
            p.copy_(torch.empty_like(p, device="cpu").normal_(std=spread(name, p, init, n_layers), generator=generator))
            if init == "unit_embedding" and name.endswith("position"):
                p.copy_(sinusoids(*p.shape))


def spread(name: str, weight: Tensor, init: str, n_layers: int) -> float:
    """The standard deviation of a fresh weight, by the name of its module."""
    if init == "gpt2":
        return 0.02 / math.sqrt(2 * n_layers) if name.endswith(RESIDUAL_WRITERS) else 0.02
    if name.startswith("embedding"):
        return 1.0 if name.endswith("token") else 0.02
    return 1 / math.sqrt(weight.shape[1])


def sinusoids(max_len: int, d_model: int) -> Float[Tensor, "max_len d_model"]:
    """PE(t, 2i) = sin(t / 10000^(2i / d_model)), PE(t, 2i + 1) = cos of the same. Vaswani et al. 2017, section 3.5."""
    t = torch.arange(max_len, dtype=torch.float32)[:, None]
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float32) / d_model)
    table = torch.zeros(max_len, d_model)
    table[:, 0::2] = torch.sin(t * frequency)
    table[:, 1::2] = torch.cos(t * frequency)[:, : d_model // 2]
    return table

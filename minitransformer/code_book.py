"""Weights in 4 bits: a code for each, a scale for each block, and a book that says what a code means.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3 and appendix E.

    w = c book[q]                  q: 4 bits for each weight;  c: the largest |w| of each block of, say, 64
    c = mean(c) + s k              double quantisation;  k: 8 bits for each scale;  s: one for 256 of them

    "nf4"     the book is quantiles of the normal distribution: weights look normal, so all codes serve about equally
    "int4"    -7/7, -6/7, …, 7/7: evenly spaced, for comparison

Shapes: W [d_out, d_in]; two codes a byte, the first in the upper half, [d_out, d_in / 2]. Blocks lie within rows.
Bits a weight, with blocks of 64: 4 + 32/64 = 4.5, and doubly quantised 4 + 8/64 + 32/(64 * 256) = 4.127.

Differs from the paper: the scales get 8-bit integers, where it has 8-bit floats.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

GROUP = 256  # scales that share one of their own
Weight = Float[Tensor, "d_out d_in"]
Bytes = UInt8[Tensor, "..."]


def normal_float() -> Float[Tensor, "16"]:
    """NF4, from -1 to 1. Dettmers et al. 2023, equation 4 and appendix E.

    8 probabilities from delta to 1/2 and 9 from there to 1 - delta, so that 0 is among the values, and exact.
    """
    delta = (1 / 32 + 1 / 30) / 2
    below = torch.linspace(delta, 0.5, 8, dtype=torch.float64)
    above = torch.linspace(0.5, 1 - delta, 9, dtype=torch.float64)[1:]
    quantiles = torch.special.ndtri(torch.cat([below, above]))
    return (quantiles / quantiles[-1]).float()


BOOKS = {"nf4": normal_float(), "int4": torch.arange(-8, 8).float() / 7}  # of the latter, the first is never used
# What each byte says: the values of its two codes, two float32 that are moved as one number of 64 bits.
PAIRS = {name: torch.cartesian_prod(book, book).view(torch.int64).flatten() for name, book in BOOKS.items()}


def packed(weight: Weight, book: str, block: int, double: bool) -> dict[str, Bytes]:
    """What is stored of a weight: `codes`, `scales` and, if these are quantised as well (`double`), `steps`.

    All as bytes, which no cast to another precision touches.
    """
    blocks, values = weight.detach().float().reshape(-1, block), BOOKS[book].to(weight.device)
    scales = blocks.abs().amax(dim=1)
    middles = (values[1:] + values[:-1]) / 2  # from one of these to the next, a code is the nearest
    codes = torch.bucketize(blocks / without_zeros(scales)[:, None], middles).to(torch.uint8)
    first, second = codes.view(len(weight), -1, 2).unbind(dim=2)
    kept = packed_scales(scales) if double else {"scales": scales}
    return {"codes": 16 * first + second} | {name: tensor.view(torch.uint8) for name, tensor in kept.items()}


def unpacked(book: str, codes: Bytes, scales: Bytes, steps: Bytes | None = None) -> Weight:
    """The weight, in float32."""
    if steps is None:
        scales = scales.view(torch.float32)
    else:
        scales = unpacked_scales(scales.view(torch.int8), steps.view(torch.float32))
    values = PAIRS[book].to(codes.device).index_select(0, codes.flatten().int())
    return values.view(torch.float32).view(len(scales), -1).mul_(scales[:, None]).view(len(codes), -1)


def packed_scales(scales: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """8 bits for each, k; and as `steps` one s for each 256 of them, and the mean at the end.

    Scales are positive, so their mean is taken off first.
    """
    mean = scales.mean()
    groups = F.pad(scales - mean, (0, -len(scales) % GROUP)).view(-1, GROUP)
    steps = groups.abs().amax(dim=1) / 127
    k = (groups / without_zeros(steps)[:, None]).round().to(torch.int8).flatten()
    return {"scales": k[: len(scales)], "steps": torch.cat([steps, mean[None]])}


def unpacked_scales(k: Int8[Tensor, " n"], steps: Float[Tensor, " groups_and_1"]) -> Float[Tensor, " n"]:
    """mean + s k."""
    return torch.addcmul(steps[-1], k.float(), steps[:-1].repeat_interleave(GROUP)[: len(k)])


def without_zeros(scales: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """To be divided by: where all weights of a block are 0, so is its scale, whatever the codes."""
    return scales.clamp(min=torch.finfo(scales.dtype).tiny)

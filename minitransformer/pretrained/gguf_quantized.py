"""A Llama whose weights stay in the bytes of a GGUF file: each row in blocks of 32 weights.

    "Q4_1"    w = d q + m       in 20 bytes a scale d and a minimum m of 16 bits each, and 32 codes q of 4 bits
    "Q8_0"    w = d q           in 34 bytes a scale d of 16 bits, and 32 codes q of 8 bits

So the file is a 4-bit frozen base as it is: 5 bits a weight, 8.5 for an embedding. Only whole rows change places, those
of query and key.

Source: llama.cpp's formats, as the library `gguf` undoes them: the weights here are the same to the last bit.
"""

from pathlib import Path

import torch
from torch import Tensor

from minitransformer.code_book import Bytes, Weight
from minitransformer.pretrained.gguf_file import dequantized, gguf_tensors
from minitransformer.pretrained.llama import HEAD, from_llama, names
from minitransformer.quantized_layer import QuantizedEmbedding, QuantizedLinear
from minitransformer.transformer import Transformer


def q4_1(blocks: Bytes) -> Weight:
    """The weight in float32. The lower halves of the 16 bytes of codes come first, then the upper halves."""
    each = blocks.view(torch.int32).view(-1, 5)  # four bytes at a time
    d, m = each[:, 0].contiguous().view(torch.float16).view(-1, 2).float().split(1, dim=1)
    codes = each[:, 1:].contiguous()
    q = torch.cat([codes & 0x0F0F0F0F, codes >> 4 & 0x0F0F0F0F], dim=1).view(torch.uint8)
    return q.float().mul_(d).add_(m).view(len(blocks), -1)


def q8_0(blocks: Bytes) -> Weight:
    """The weight in float32."""
    each = blocks.view(-1, 34)
    d, q = each[:, :2].view(torch.float16), each[:, 2:].view(torch.int8)
    return q.float().mul_(d).view(len(blocks), -1)


KINDS = {"Q4_1": (q4_1, 20, 4), "Q8_0": (q8_0, 34, 2)}  # and the bytes of 32 weights, and of their d and m


def gguf_quantized(path: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model, in evaluation mode and frozen: linear layers and embedding as they are in the file, if of these kinds.

    Args:
        path: of a file whose architecture is "llama".
        dtype: of all else, and of what is computed.

    Raises:
        ModuleNotFoundError: `gguf` is not installed; the message says the command.
        ValueError: no such file, another architecture, or an option or a tensor that we do not know.
    """
    tensors, config = gguf_tensors(path)
    stored, weights = {}, {}
    for name, (kind, rows) in tensors:
        if kind in KINDS and rows.ndim == 2 and name != HEAD:
            stored[name] = kind, rows
            weights[name] = _placeholder(kind, rows, dtype)
        else:
            weights[name] = dequantized(kind, rows, dtype)
    model = from_llama(weights, config, assign=True).requires_grad_(False)
    for ours, theirs in names(model.config.n_layers).items():
        if own := stored.get(f"model.{theirs}.weight"):
            parent, _, attribute = ours.rpartition(".")
            layer = model.get_submodule(ours)
            quantized = QuantizedEmbedding if ours == "embedding.token" else QuantizedLinear
            setattr(model.get_submodule(parent), attribute, quantized(KINDS[own[0]][0], {"blocks": own[1]}, layer))
    return model


def _placeholder(kind: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight of the right shape that takes no memory, until the blocks take its place: 0, or NaN if a weight of
    theirs is not finite."""
    _, size, front = KINDS[kind]
    scales = rows.view(-1, size)[:, :front].contiguous().view(torch.float16)
    return (0 * scales.float().sum()).to(dtype).expand(len(rows), rows.shape[1] // size * 32)

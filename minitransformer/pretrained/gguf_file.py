"""GGUF, the file format of llama.cpp: a Llama in it, as a state dict and config in Hugging Face's names.

The library `gguf`, by the makers of the format, reads it and undoes every kind of quantisation; `gguf_quantized.py`
leaves it as it is.

llama.cpp rotates neighbouring pairs of a head, rows 2j and 2j + 1, where Hugging Face (Su et al. 2021, equation 34, up
to the order of rows) rotates rows j and j + d_head / 2; so the rows of query and key are put back into halves.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from minitransformer.environment import PIP_INSTALL

# llama.cpp's module -> Hugging Face's.
MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {  # below blk.{i} and model.layers.{i}
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}  # by heads: the option that says how many
OPTIONS = {  # llama.cpp's, below "llama." -> Hugging Face's
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_dim",
}

Stored = tuple[str, Tensor]  # the kind of quantisation, and the rows: bytes, or numbers where there is none


def gguf_llama(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the config, as `from_llama` takes them.

    Weights are read and dequantised one at a time: little memory is needed beside the result.

    Args:
        path: of a file whose architecture is "llama".
        dtype: of the tensors.

    Raises:
        ModuleNotFoundError: `gguf` is not installed; the message says the command.
        ValueError: no such file, another architecture, or an option or a tensor that we do not know.
    """
    stored, config = gguf_tensors(path)
    return {name: dequantized(*own, dtype) for name, own in stored}, config


def gguf_tensors(path: str | Path) -> tuple[Iterator[tuple[str, Stored]], dict[str, Any]]:
    """Each tensor under Hugging Face's name, as it is stored, and the config; args and errors as in `gguf_llama`."""
    reader = gguf_reader(path)
    config = _config(path, reader)
    reader.fields.clear()  # the words of the vocabulary: tens of megabytes that serve nobody here
    config["tie_word_embeddings"] = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return (_stored(path, tensor, config) for tensor in reader.tensors), config


def dequantized(kind: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What `rows` of this kind of quantisation (or of none, such as "F32") say."""
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType[kind])).to(dtype)


def gguf_reader(path: str | Path):
    """A `gguf.GGUFReader`: its `fields[name].contents()` are options and lists of words, its `tensors` the weights.

    Raises:
        ModuleNotFoundError: `gguf` is not installed; the message says the command.
        ValueError: the file is absent or no GGUF.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"gguf cannot be imported ({error}); install it with all it needs by `{PIP_INSTALL} gguf`", name="gguf"
        ) from error

    class Reader(GGUFReader):
        """Slices a plain array: a slice of `numpy.memmap` takes thrice the time and memory, and there are 300,000."""

        def _get(self, *args, **options):
            self.data = np.asarray(self.data)
            return super()._get(*args, **options)

    try:
        return Reader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as GGUF ({error}): absent, cut off, damaged or of another kind"
        ) from error


def _config(path: str | Path, reader) -> dict[str, Any]:
    """What config.json would say."""
    options = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if (kind := options.get("general.architecture")) != "llama":
        raise ValueError(f'{path} holds the architecture {kind!r}, but only "llama" is read; choose such a file')
    given = {name.removeprefix("llama."): value for name, value in options.items() if name.startswith("llama.")}
    if unknown := sorted(given.keys() - OPTIONS.keys()):
        raise ValueError(f"{path} has llama.{unknown[0]}={given[unknown[0]]!r}, which is not computed; choose another")
    config = {"model_type": "llama", "hidden_act": "silu"} | {OPTIONS[name]: value for name, value in given.items()}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    if wrong := [name for name in PERMUTED.values() if type(config.get(name)) is not int]:
        raise ValueError(
            f"{path} has {wrong[0]}={config.get(wrong[0])!r}, but every layer must have the same number of heads"
        )
    return config


def _stored(path: str | Path, tensor, config: dict[str, Any]) -> tuple[str, Stored]:
    """One tensor under Hugging Face's name, with its rows in our order."""
    module, _, last = tensor.name.rpartition(".")
    layer = module.split(".")
    if module in MODEL:
        name = MODEL[module]
    elif len(layer) == 3 and layer[0] == "blk" and layer[2] in LAYER:
        name = f"model.layers.{layer[1]}.{LAYER[layer[2]]}"
    else:
        raise ValueError(f"{path} has the tensor {tensor.name!r}, which has no place in a Llama; choose another file")
    # Not `tensor.data`: what was read through a memory map would count as this process's memory to the end.
    stored = np.fromfile(path, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset)
    rows = torch.from_numpy(stored.reshape(tensor.data.shape))
    if heads := PERMUTED.get(layer[-1]):
        if config[heads] < 1 or len(rows) % (2 * config[heads]):
            raise ValueError(f"{path} has {len(rows)} rows in {tensor.name}, but {heads}={config[heads]}")
        rows = in_halves(rows, config[heads])
    return f"{name}.{last}", (tensor.tensor_type.name, rows)


def in_halves(rows: Shaped[Tensor, "d_out *d_in"], n_heads: int) -> Shaped[Tensor, "d_out *d_in"]:
    """The rows of each head, from pairs (0, 1), (2, 3), … to two halves that face each other."""
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

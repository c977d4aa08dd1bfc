"""GGUF files of a tiny Llama with random weights, written by the format's own library."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

D, FFN, V, LAYERS, HEADS, KV, D_HEAD = 64, 96, 32, 2, 4, 2, 16


def permuted(weight, n_heads):
    """What llama.cpp's converter does to query and key."""
    return weight.reshape(n_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def weights(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {at + "self_attn.q_proj": (HEADS * D_HEAD, D), at + "self_attn.o_proj": (D, HEADS * D_HEAD)}
        shapes |= {at + f"self_attn.{kind}_proj": (KV * D_HEAD, D) for kind in "kv"}
        shapes |= {at + "mlp.gate_proj": (FFN, D), at + "mlp.up_proj": (FFN, D), at + "mlp.down_proj": (D, FFN)}
        shapes |= {at + name: (D,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {f"{name}.weight": random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, tensors, kind=None, architecture="llama", options=None, more=None):
    """A file with these weights, the matrices quantised to `kind`."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(V)
    writer.add_context_length(40)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5_000.0)
    writer.add_rope_dimension_count(D_HEAD)
    for name, value in (options or {}).items():
        writer.add_float32(name, value)
    for name, tensor in tensors.items():
        if ".q_proj." in name or ".k_proj." in name:
            tensor = permuted(tensor, HEADS if ".q_proj." in name else KV)
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind is None or tensor.ndim == 1:
            writer.add_tensor(own, tensor)
        else:
            writer.add_tensor(own, gguf.quantize(tensor, kind), raw_dtype=kind)
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

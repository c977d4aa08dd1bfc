"""GGUF files that the format's own library writes, in llama.cpp's names and order of rows."""

import sys

import numpy as np
import pytest
import torch
from reference.gguf_files import D_HEAD, FFN, HEADS, KV, LAYERS, D, V, weights, write

from minitransformer.pretrained.gguf_file import gguf_llama, in_halves

gguf = pytest.importorskip("gguf")


def test_every_weight_comes_back_under_its_name_and_in_its_order(tmp_path):
    tensors, config = gguf_llama(write(tmp_path / "m.gguf", weights()))
    assert tensors.keys() == weights().keys()
    for name, weight in weights().items():
        assert torch.equal(tensors[name], torch.from_numpy(weight)), name
    assert config.pop("rms_norm_eps") == pytest.approx(1e-6)
    assert config == {
        "model_type": "llama", "hidden_act": "silu", "vocab_size": V, "max_position_embeddings": 40, "hidden_size": D,
        "num_hidden_layers": LAYERS, "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "rope_theta": 5_000.0, "head_dim": D_HEAD, "tie_word_embeddings": True,
    }  # fmt: skip


def test_biases_and_a_head_of_its_own(tmp_path):
    biases = {f"model.layers.0.self_attn.{kind}_proj.bias": np.arange(n * D_HEAD, dtype=np.float32)
              for kind, n in (("q", HEADS), ("k", KV), ("v", KV))}  # fmt: skip
    own = weights() | biases | {"lm_head.weight": weights(1)["model.embed_tokens.weight"]}
    tensors, config = gguf_llama(write(tmp_path / "m.gguf", own))
    assert config["tie_word_embeddings"] is False
    for name, weight in own.items():
        assert torch.equal(tensors[name], torch.from_numpy(weight)), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_are_what_the_library_says(tmp_path, kind, dtype):
    kind = gguf.GGMLQuantizationType[kind]
    tensors, _ = gguf_llama(write(tmp_path / "m.gguf", weights(), kind), dtype)
    for name, weight in weights().items():
        if weight.ndim == 2:  # blocks lie within rows, so the order of the rows does not matter
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
        assert tensors[name].dtype == dtype and torch.equal(tensors[name], torch.tensor(weight).to(dtype)), name


def test_rows_go_from_pairs_to_halves():
    rows = torch.arange(12.0)[:, None]  # two heads of six
    assert in_halves(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_the_tensors_are_copies(tmp_path):
    """Nothing of the file stays open, and writing into them is allowed."""
    path = write(tmp_path / "m.gguf", weights())
    before = path.read_bytes()
    tensors, _ = gguf_llama(path)
    for tensor in tensors.values():
        tensor.add_(1.0)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "qwen2"}, "the architecture 'qwen2'"),
        ({"options": {"llama.rope.scaling.factor": 4.0}}, r"llama.rope.scaling.factor=4.0, which is not computed"),
        ({"options": {"llama.expert_count": 4.0}}, r"llama.expert_count=4.0"),
        ({"more": {"rope_freqs.weight": np.ones(8, np.float32)}}, "'rope_freqs.weight', which has no place"),
        ({"more": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}}, "attn_q_norm.weight', which has no place"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        gguf_llama(write(tmp_path / "m.gguf", weights(), **changes))


@pytest.mark.parametrize(("heads", "kv"), [(3, 2), (0, 2), (4, 3), (4, 0)])
def test_a_number_of_heads_that_does_not_fit_is_refused(tmp_path, monkeypatch, heads, kv):
    path, count = tmp_path / "m.gguf", "llama.attention.head_count"
    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count", lambda own, _: own.add_uint32(count, heads))
    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count_kv", lambda own, _: own.add_uint32(f"{count}_kv", kv))
    with pytest.raises(ValueError, match=r"m.gguf has \d\d rows in blk.0.attn_[qk].weight, but num_\w+=[03]"):
        gguf_llama(write(path, weights()))


def test_damaged_files_are_refused(tmp_path):
    whole = write(tmp_path / "m.gguf", weights()).read_bytes()
    for data in (b"", b"GGUF", whole[:200], whole[:5_000], whole[:-40_000], b"other" + whole):
        (tmp_path / "damaged.gguf").write_bytes(data)
        with pytest.raises(ValueError, match=r"damaged.gguf cannot be read as GGUF"):
            gguf_llama(tmp_path / "damaged.gguf")
    with pytest.raises(ValueError, match=r"absent.gguf cannot be read as GGUF"):
        gguf_llama(tmp_path / "absent.gguf")


def test_without_gguf_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"-m pip install gguf"):
        gguf_llama(tmp_path / "m.gguf")

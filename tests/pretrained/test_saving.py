"""What `save_pretrained` writes is what Hugging Face's library writes of that model, and is read back bit by bit."""

import json
from dataclasses import replace

import pytest
import torch
from pretrained.test_folder import CONFIG, WEIGHTS
from pretrained.test_llama import CONFIGS, state_dict
from reference.llama_shapes import SHAPES
from reference.random_weights import randomize
from reference.tiny_models import LLAMA, SIZES
from safetensors.torch import load_file
from torch import nn

from minitransformer import Transformer, TransformerConfig, dequantize, quantize
from minitransformer.files import write_whole
from minitransformer.heads import SequenceClassifier
from minitransformer.pretrained import from_bert, from_gpt2, from_llama, from_pretrained, save_pretrained
from peft import BottleneckAdapter, LoRA, attach, detach, merged_copy

BERT = {"causal": False, "norm": "post", "n_segments": 2, "embedding_norm": True, "lm_head": "bert"}
LLAMAS = [name for name, (kind, _) in SHAPES.items() if kind != "mistral"]
MODELS = {
    "gpt2": {},
    "gpt2 without a head": {"lm_head": "none", "activation": "silu", "dropout": 0.1},
    "bert": BERT,
    "bert without a head": BERT | {"lm_head": "none", "n_segments": 3, "activation": "relu", "norm_eps": 1e-12},
    "llama": LLAMA | {"bias": "none"},
    "llama untied": LLAMA | {"bias": "all", "lm_head": "untied", "head_dim": 10, "rope_theta": 50.0},
    "llama without a head": LLAMA | {"bias": "gate+up+down", "lm_head": "none", "n_kv_heads": 0},
    "qwen2": LLAMA | {"n_kv_heads": 2, "activation": "relu"},
}


def model_of(kind, **changes):
    return randomize(Transformer(TransformerConfig(**(SIZES | kind | changes))), 0).eval()


def outputs(model):
    tokens = torch.arange(12).view(2, 6) % model.config.vocab_size
    with torch.no_grad():
        return model.hidden(tokens) if model.config.lm_head == "none" else model(tokens)


def check_as_theirs(folder, tensors, config):
    """The names, shapes, types and values of Hugging Face's own file, and options as its config has them."""
    written = load_file(folder / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype, name
    said = json.loads((folder / "config.json").read_text())
    assert said.pop("torch_dtype") == "float32"
    rope = config.get("rope_parameters") or {}
    for name in said.keys() - {"architectures", "bos_token_id", "eos_token_id", "pad_token_id"}:
        expected = config.get(name, rope.get(name))
        # Llama's width of heads may be left to the sizes, GPT-2's hidden width to its default.
        derived = {"head_dim": "hidden_size", "n_inner": None}
        if expected is None and name in derived:
            continue
        assert said[name] == pytest.approx(expected), name


@pytest.mark.parametrize("family, reader", [("gpt2", from_gpt2), ("bert", from_bert)])
def test_the_file_is_the_one_that_hugging_face_writes(family, reader, tmp_path):
    save_pretrained(reader(WEIGHTS[family], CONFIG[family]), tmp_path / "out")
    check_as_theirs(tmp_path / "out", WEIGHTS[family], CONFIG[family])


@pytest.mark.parametrize("name", LLAMAS)
def test_the_file_of_a_llama_is_the_one_that_hugging_face_writes(name, tmp_path):
    save_pretrained(from_llama(state_dict(name), CONFIGS[name]), tmp_path / "out")
    check_as_theirs(tmp_path / "out", state_dict(name), CONFIGS[name])


@pytest.mark.parametrize("kind", MODELS.values(), ids=list(MODELS))
def test_what_is_written_is_read_back_bit_for_bit(kind, tmp_path):
    model = model_of(kind)
    save_pretrained(model, tmp_path / "out")
    back = from_pretrained(tmp_path / "out")
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(back), outputs(model)) and not back.training
    assert back.config.dropout == model.config.dropout and back.config.lm_head == model.config.lm_head


def test_a_mistral_is_written_as_the_llama_that_it_is(tmp_path):
    model = from_llama(state_dict("mistral"), CONFIGS["mistral"])
    save_pretrained(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert torch.equal(outputs(from_pretrained(tmp_path / "out")), outputs(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_type(dtype, tmp_path):
    model = model_of(LLAMA).to(dtype)
    save_pretrained(model, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    said = json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
    assert said == str(dtype).removeprefix("torch.")
    assert torch.equal(outputs(from_pretrained(tmp_path / "out")), outputs(model.float()))
    model.norm.float()
    save_pretrained(model.to(torch.bfloat16) if dtype == torch.float64 else model, tmp_path / "mixed")
    said = json.loads((tmp_path / "mixed" / "config.json").read_text())["torch_dtype"]
    assert said == ("bfloat16" if dtype == torch.float64 else "float32")


def test_a_weight_that_stands_at_two_places_is_written_twice(tmp_path):
    model = model_of(LLAMA | {"lm_head": "untied"})
    model.head.weight = model.embedding.token.weight
    save_pretrained(model, tmp_path / "out")
    assert torch.equal(outputs(from_pretrained(tmp_path / "out")), outputs(model))


@pytest.mark.parametrize(
    "kind, said",
    [
        ({"logit_scale": 0.25}, "nearest, GPT-2, has logit_scale=1.0 and not 0.25"),
        ({"lm_head": "untied"}, "GPT-2, has lm_head='none' and not 'untied'"),
        ({"causal": False}, "GPT-2, has causal=True and not False"),
        ({"bias": "none"}, "GPT-2, has bias='all' and not 'none'"),
        ({"head_dim": 4}, "has d_kv=16 and not 8; d_head=8 and not 4"),
        (BERT | {"n_segments": 0}, "BERT, has n_segments=2 and not 0"),
        (BERT | {"embedding_norm": False}, "BERT, has embedding_norm=True and not False"),
        (LLAMA | {"dropout": 0.1}, "Qwen2, has dropout=0.0 and not 0.1"),
        (LLAMA | {"bias": "none", "gated": False}, "Llama, has gated=True and not False"),
        (LLAMA | {"norm_type": "layer", "bias": "none"}, "Llama, has norm_type='rms' and not 'layer'"),
        (LLAMA | {"bias": "none", "norm": "post"}, "Llama, has norm='pre' and not 'post'"),
    ],
)
def test_a_model_of_no_such_architecture_is_refused_with_the_difference(kind, said, tmp_path):
    with pytest.raises(ValueError, match=f"none of Hugging Face's BERT, GPT-2, Llama, Qwen2 computes this; .*{said}"):
        save_pretrained(model_of(kind), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_has_no_part_in_the_outputs_is_no_difference(tmp_path):
    model = model_of({"attention": "written_out", "gradient_checkpointing": True, "init": "unit_embedding"})
    save_pretrained(model, tmp_path / "out")
    assert from_pretrained(tmp_path / "out").config == replace(
        model.config, attention="fused", gradient_checkpointing=False, init="gpt2"
    )


def test_attached_methods_are_refused_and_a_merged_copy_is_written(tmp_path):
    model = attach(model_of(LLAMA), LoRA(rank=2))
    model.blocks[0].attention.query.B.data.fill_(0.1)
    with pytest.raises(ValueError, match=r"query is a \w+, so this is no plain .*write merged_copy\(model\)"):
        save_pretrained(model, tmp_path / "out")
    save_pretrained(merged_copy(model), tmp_path / "out")
    torch.testing.assert_close(outputs(from_pretrained(tmp_path / "out")), outputs(model))
    attach(detach(model), BottleneckAdapter(bottleneck=2))
    with pytest.raises(ValueError, match=r"else detach\(model\) first"):
        save_pretrained(model, tmp_path / "again")


def test_quantised_weights_are_refused_and_written_once_they_are_unpacked(tmp_path):
    model = quantize(model_of(LLAMA).requires_grad_(False), block=4)
    with pytest.raises(ValueError, match=r"query is a QuantizedLinear, .*dequantize\(model\) where it is quantised"):
        save_pretrained(model, tmp_path / "out")
    expected = outputs(model)
    save_pretrained(dequantize(model), tmp_path / "out")
    torch.testing.assert_close(outputs(from_pretrained(tmp_path / "out")), expected)


class Other(Transformer):
    pass


def exchanged(model):
    model.blocks[1].norm_attention = nn.BatchNorm1d(16)
    return model


def resized(model):
    model.embedding.token = nn.Embedding(30, 16)
    return model


def damaged(model):
    model.blocks[0].attention.key.weight.data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda model: SequenceClassifier(model, 2), "got SequenceClassifier; pass the Transformer in it"),
        (lambda model: Other(model.config), "got Other; pass the Transformer"),
        (lambda model: nn.DataParallel(model), "got DataParallel; pass the Transformer"),
        (exchanged, "blocks.1.norm_attention is a BatchNorm1d"),
        (resized, r"embedding.token.weight has shape \(30, 16\), but the model's config says \(23, 16\)"),
        (damaged, "'blocks.0.attention.key.weight' has values that are not finite"),
        (lambda model: model.to("meta"), "has no data"),
    ],
)
def test_what_is_no_plain_transformer_is_refused(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        save_pretrained(change(model_of({})), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, target = model_of({}), tmp_path / "out"
    target.mkdir()
    save_pretrained(model, target)  # an empty folder may be there
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors"]
    with pytest.raises(FileExistsError, match="out is there already; choose another name, or remove it first"):
        save_pretrained(model_of(LLAMA), target)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is there already"):
        save_pretrained(model, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_pretrained(model, tmp_path / "no" / "out")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before

    def full(path, data):
        if path.name == "model.safetensors":
            raise OSError("no space left")
        write_whole(path, data)

    monkeypatch.setattr("minitransformer.files.write_whole", full)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(model, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]

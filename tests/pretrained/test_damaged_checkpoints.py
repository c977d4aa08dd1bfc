"""Folders of `save_pretrained`, damaged: none is read, none runs code, and the message is a ValueError with a cure."""

import random
import shutil

import pytest
from pretrained.test_saving import MODELS, model_of
from reference.damaged_folders import OF_NO_OPTION, all_damages, of_options

from minitransformer.pretrained import from_pretrained, save_pretrained

KINDS = ("gpt2", "bert", "llama untied", "qwen2")
SIZES = {
    "gpt2": ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "n_inner"),
    "bert": ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "type_vocab_size"),
    "llama untied": ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    "qwen2": ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"),
}
NUMBERS = {
    "gpt2": ("layer_norm_epsilon", "attn_pdrop"),
    "bert": ("layer_norm_eps", "hidden_dropout_prob"),
    "llama untied": ("rms_norm_eps", "rope_theta"),
    "qwen2": ("rms_norm_eps", "rope_theta"),
}
NO_NUMBERS = ["x", -1, True, ["x"], {}, float("nan"), float("inf"), None]


def options(kind):
    """What each option cannot be."""
    found = {name: [*OF_NO_OPTION, 0, 2**29] for name in SIZES[kind]} | dict.fromkeys(NUMBERS[kind], NO_NUMBERS)
    found["hidden_act" if kind != "gpt2" else "activation_function"] = ["x", 1, None, [], {"x": 1}]
    found["model_type"] = ["roberta", "x", 1, [], *({"gpt2", "bert", "llama", "mistral"} - {kind.split()[0]})]
    found["tie_word_embeddings"] = ["x", 1, [], {}, float("nan"), None]
    found |= {"quantization_config": [{"bits": 4}], "is_encoder_decoder": [True, "x"], "add_cross_attention": [True, 1]}
    if "llama" in kind or kind == "qwen2":
        found |= {"rope_scaling": [{"type": "linear", "factor": 2.0}, "x", [1]], "layer_types": [["x"], "x", 1, [[]]]}
        found |= {"attention_bias": ["x", 1, []], "mlp_bias": ["x", 1]} if "llama" in kind else {}
    return found


def damages(kind, n):
    generator = random.Random(0)
    yield from all_damages("config.json", "model.safetensors", generator, n)
    yield from of_options("config.json", options(kind))


EVERY_KIND = [pytest.param(kind, 1, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize("kind, step", [("llama untied", 8), *EVERY_KIND])
def test_no_damaged_folder_is_read(kind, step, tmp_path, unchecked):
    save_pretrained(model_of(MODELS[kind]), tmp_path / "sound")
    accepted, tried = [], [*damages(kind, 12)][::step]
    for what, damage in tried:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "sound", folder)
        damage(folder)
        try:
            from_pretrained(folder)
        except ValueError as error:
            assert str(error)
        else:
            accepted.append(what)
        assert not (folder / "run").exists(), what
        shutil.rmtree(folder)
    assert not accepted and len(tried) * step >= 300
    from_pretrained(tmp_path / "sound")

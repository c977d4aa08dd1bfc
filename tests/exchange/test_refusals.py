"""What one of both sides cannot say or compute is refused, with the model, or the place of the folder, as it was."""

import json

import pytest
import torch
from reference.exchange_models import built, classifier, with_methods
from reference.method_cases import assert_same, fingerprint
from reference.their_form import read, write

import peft
from minitransformer import Transformer, TransformerConfig
from peft import IA3, BitFit, BottleneckAdapter, LoRA, PrefixTuning, PromptTuning, VeRA

NOT_WRITTEN = {
    "nothing attached": ("llama", (), "no method is attached"),
    "an adapter": ("llama", (BottleneckAdapter(bottleneck=3),), "no form for what BottleneckAdapter"),
    "biases": ("bert", (BitFit(),), "no form for what BitFit"),
    "two methods": ("llama", (LoRA(rank=2), IA3()), "a folder holds one method"),
    "a prefix of inputs": ("llama", (PrefixTuning(length=3, at="hidden"),), 'train at="kv"'),
    "a gated prefix": ("llama", (PrefixTuning(length=3, gated=True),), "without gate"),
    "a prefix of an MLP": ("llama", (PrefixTuning(length=3, reparameterize=4),), r"fold\(model\) first"),
    "a prefix of one layer": ("llama", (PrefixTuning(length=3, layers=(1,)),), "in every layer"),
    "a prefix, learned positions": ("gpt2", (PrefixTuning(length=3),), "no keys make up for that"),
    "two dropouts": (
        "llama",
        (LoRA(rank=2, targets=("query",)), LoRA(rank=2, dropout=0.1, targets=("value",))),
        "one dropout for all layers",
    ),
    "two scales in c_attn": (
        "gpt2",
        (LoRA(rank=2, targets=("query",)), LoRA(rank=2, alpha=3.0, targets=("value",))),
        "different scales",
    ),
    "VeRA on c_attn": ("gpt2", (VeRA(rank=2),), "choose other targets for VeRA"),
    "a prompt, masked words": ("bert", (PromptTuning(length=3),), "choose LoRA"),
    "two VeRA": ("llama", (VeRA(rank=2, targets=("query",)), VeRA(rank=2, targets=("value",))), "attach one VeRA"),
}
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OPTIONS = {  # method, option, value, message
    "unknown method": (LoRA(rank=2), "peft_type", "LOHA", "only LORA, IA3"),
    "no method": (LoRA(rank=2), "peft_type", None, "peft_type None"),
    "a list for a method": (LoRA(rank=2), "peft_type", ["LORA"], "only LORA, IA3"),
    "another rank": (LoRA(rank=2), "r", 3, r"config and model say \[3, 24\]"),
    "no rank": (LoRA(rank=2), "r", "2", "whole number"),
    "alpha 0": (LoRA(rank=2), "lora_alpha", 0, "another number than 0"),
    "alpha infinite": (LoRA(rank=2), "lora_alpha", float("inf"), "Infinity is no number of JSON"),
    "alpha too large": (LoRA(rank=2), "lora_alpha", 10**400, "finite number"),
    "a pattern of nothing": (LoRA(rank=2), "alpha_pattern", {"q_project": 3}, "no such module"),
    "two patterns": (LoRA(rank=2), "alpha_pattern", {"0.self_attn.q_proj": 3, "q_proj": 5}, r"the values \[3, 5\]"),
    "an expression": (LoRA(rank=2), "rank_pattern", {"(q+)+": 3}, "plain names"),
    "biases": (LoRA(rank=2), "bias", "all", "only 'none'"),
    "an unknown option": (LoRA(rank=2), "use_mora", True, "use_mora=True"),
    "weights that change": (LoRA(rank=2), "init_lora_weights", "pissa", "init_lora_weights='pissa'"),
    "a variant with its defaults": (LoRA(rank=2), "kasa_config", {}, r"kasa_config=\{\}"),
    "four bits at the start": (LoRA(rank=2), "loftq_config", {"loftq_bits": 4}, "loftq_config"),
    "parameters": (LoRA(rank=2), "target_parameters", ["w"], "target_parameters"),
    "an expression for targets": (LoRA(rank=2), "target_modules", ".*q_proj", "write the names"),
    "more targets": (LoRA(rank=2), "target_modules", ["q_proj", "k_proj", "v_proj"], "lacks .*k_proj.lora_A"),
    "fewer targets": (LoRA(rank=2), "target_modules", ["q_proj"], "tensors of .*v_proj"),
    "other targets": (LoRA(rank=2), "target_modules", ["nothing"], "asks for no layer"),
    "no layer": (LoRA(rank=2), "layers_to_transform", 0.0, "whole numbers"),
    "magnitudes asked for": (LoRA(rank=2), "use_dora", True, "lacks .*magnitude"),
    "a pooled head": (LoRA(rank=2), "task_type", "SEQ_CLS", "which no head of ours does"),
    "another head": (LoRA(rank=2), "modules_to_save", ["embed_tokens"], "no such head"),
    "a head that is not there": (LoRA(rank=2), "modules_to_save", ["lm_head"], "lacks base_model.model.lm_head"),
    "no feed-forward": (IA3(), "feedforward_modules", [], r"say \[24, 1\]"),
    "another feed-forward": (IA3(), "feedforward_modules", ["down_proj", "up_proj"], "names 'up_proj'"),
    "random A": (VeRA(rank=4), "vera_dropout", 0.1, "vera_dropout"),
    "other layers": (PrefixTuning(length=3), "num_layers", 3, "num_layers=3"),
    "other heads": (PrefixTuning(length=3), "num_attention_heads", 4, "num_attention_heads=4"),
    "a prefix without a task": (PrefixTuning(length=3), "task_type", None, "without a task_type"),
    "a prompt without a task": (PromptTuning(length=3), "task_type", None, "without a task_type"),
    "another length": (PromptTuning(length=3), "num_virtual_tokens", 4, "say"),
    "two stacks": (PromptTuning(length=3), "num_transformer_submodules", 2, "only 1 is supported"),
}


def folder_of(recipe, path, family="llama"):
    peft.to_huggingface(with_methods(built(family), recipe), path)
    return path


def refused(model, folder, message):
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        peft.from_huggingface(model, folder)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_a_folder_cannot_say_is_not_written(case, tmp_path):
    family, recipes, message = NOT_WRITTEN[case]
    model = with_methods(built(family), *recipes)
    with pytest.raises(ValueError, match=message):
        peft.to_huggingface(model, tmp_path / "folder")
    assert [*tmp_path.iterdir()] == []


def test_a_module_that_is_trained_whole_is_a_head_or_refused(tmp_path):
    model = with_methods(built("bert"), LoRA(rank=2), train_also=("head",))
    with pytest.raises(ValueError, match="trained whole"):
        peft.to_huggingface(model, tmp_path / "folder")


def test_a_shape_that_they_have_not_is_refused(tmp_path):
    model = with_methods(Transformer(TransformerConfig(20, 12, 16, 2, 2, 24, logit_scale=0.5)), LoRA(rank=2))
    with pytest.raises(ValueError, match=r"none of Hugging Face's .* logit_scale=1.0 and not 0.5"):
        peft.to_huggingface(model, tmp_path / "folder")


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_we_do_not_compute_is_refused(case, tmp_path):
    recipe, name, value, message = OPTIONS[case]
    config, tensors = read(folder_of(recipe, tmp_path / "folder"))
    refused(built("llama"), write(tmp_path / "folder", config | {name: value}, tensors), message)


def test_of_an_option_and_its_tensors_the_option_is_the_reason(tmp_path):
    """As `lora_bias` has them: what to change is in the config, and no other model would take the folder."""
    config, tensors = read(folder_of(LoRA(rank=2), tmp_path / "folder"))
    tensors[LORA.replace("lora_A.weight", "lora_B.bias")] = torch.zeros(24)
    refused(built("llama"), write(tmp_path / "folder", config | {"lora_bias": True}, tensors), "lora_bias=True")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(LORA), "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        (lambda t: t.update({"../x": t.pop(LORA)}), r"'../x' has no place"),
        (lambda t: t.update({LORA.replace("layers.0", "layers.2"): t[LORA]}), "has no place"),
        (lambda t: t.update({"base_model.model.score.weight": t[LORA]}), "has no place"),
        (lambda t: t.update({LORA: t[LORA].T}), r"has shape \[24, 2\]"),
        (lambda t: t.update({LORA: t[LORA].long()}), "is of torch.int64"),
        (lambda t: t.update({LORA: t[LORA] / 0}), "NaN or an infinity"),
        (lambda t: t.update({LORA: 1e300 * t[LORA].double()}), "NaN or an infinity"),
        (lambda t: t.clear(), "lacks"),
    ],
)
def test_damaged_tensors_are_refused(change, message, tmp_path):
    config, tensors = read(folder_of(LoRA(rank=2), tmp_path / "folder"))
    change(tensors)
    refused(built("llama"), write(tmp_path / "folder", config, tensors), message)


RECORD = {"transformer.h.0.attn.c_attn": {"query": [0, 2, 16], "value": [2, 4, 16]}}


@pytest.mark.parametrize(
    "record, message",
    [
        ("nonsense", "cannot be read"),
        ([1], "cannot be read"),
        ({"another": {}}, "speaks of 'another'"),
        *[({"transformer.h.0.attn.c_attn": wrong}, "does not fit") for wrong in (
            3, {}, {"query": [0, 2, 16]}, {"key": [0, 2, 16]}, {"query": [0, 2, 15], "value": [2, 4, 16]},
            {"query": [2, 0, 16], "value": [2, 4, 16]},
            {"query": [0, 2], "value": [2, 4, 16]}, {"query": [0, 1, 8], "value": [2, 4, 16]},
        )],
    ],
)  # fmt: skip
def test_a_record_that_does_not_fit_is_refused(record, message, tmp_path):
    config, tensors = read(folder_of(LoRA(rank=2), tmp_path / "folder", "gpt2"))
    text = record if isinstance(record, str) else json.dumps(record)
    refused(built("gpt2"), write(tmp_path / "folder", config, tensors, metadata={"peft-from-scratch": text}), message)


def test_the_model_must_be_the_one_that_the_folder_is_of(tmp_path):
    folder = folder_of(LoRA(rank=2), tmp_path / "folder")
    refused(built("gpt2"), folder, "has no place")
    refused(built("bert"), folder, "CAUSAL_LM is a decoder's")
    refused(with_methods(built("llama"), LoRA(rank=2)), folder, "is attached to this model")
    refused(built("gpt2"), folder_of(PromptTuning(length=3), tmp_path / "prompt"), "num_attention_heads=4")


def test_learned_positions_take_no_prefix_of_theirs(tmp_path):
    folder = folder_of(PrefixTuning(length=3), tmp_path / "folder")
    refused(built("gpt2"), folder, "no keys make up for that")


def test_a_folder_must_be_there_with_both_files_and_no_pickle(tmp_path):
    refused(built("llama"), tmp_path / "nowhere", "is no folder")
    folder = folder_of(LoRA(rank=2), tmp_path / "folder")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(built("llama"), folder, "is a pickle")
    (folder / "adapter_model.bin").unlink()
    refused(built("llama"), folder, "is absent")
    (folder / "adapter_config.json").write_text("[]")
    refused(built("llama"), folder, "no JSON object")
    (folder / "adapter_config.json").unlink()
    refused(built("llama"), folder, "adapter_config.json is absent")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = with_methods(built("llama"), LoRA(rank=2))
    (tmp_path / "empty").mkdir()
    peft.to_huggingface(model, tmp_path / "empty")
    before = {path: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    with pytest.raises(FileExistsError, match="remove it first"):
        peft.to_huggingface(model, tmp_path / "empty")
    assert before == {path: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    with pytest.raises(FileNotFoundError, match="make it first"):
        peft.to_huggingface(model, tmp_path / "a" / "b")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        peft.to_huggingface(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_head_of_another_width_changes_nothing(tmp_path):
    peft.to_huggingface(with_methods(classifier("gpt2"), LoRA(rank=2), train_also=("head",)), tmp_path / "folder")
    config, tensors = read(tmp_path / "folder")
    tensors["base_model.model.classifier.bias"] = torch.zeros(4)
    refused(classifier("gpt2"), write(tmp_path / "folder", config, tensors), "head.bias has shape")

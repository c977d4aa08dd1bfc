"""LoRA, DoRA, IA3 and VeRA in folders: what they compute there, as a change of the weights, is what we compute."""

import pytest
import torch
from reference.exchange_models import built, classifier, logits, with_methods
from reference.their_form import changed, read, state_dict, write

import peft
from peft import ALL_LINEARS, IA3, DoRA, LoRA, VeRA
from peft.exchange.fused import Update, joined
from peft.exchange.names import PARTS

EVERY = (*ALL_LINEARS, "gate")
OURS = {  # family, recipes
    "lora": ("llama", LoRA(rank=3, alpha=5)),
    "lora A": ("llama", LoRA(rank=3, alpha=5.5, train=("A",), targets=EVERY)),
    "lora B": ("llama", LoRA(rank=3, alpha=5, train=("B",))),
    "rank-stabilised": ("llama", LoRA(rank=3, alpha=5, rank_stabilized=True, layers=(1,))),
    "several": (
        "llama",
        LoRA(rank=3, alpha=5, targets=("query",)),
        LoRA(rank=2, alpha=7, targets=("value", "down"), layers=(0,)),
        LoRA(rank=1, alpha=5, targets=("value", "up"), layers=(1,)),
    ),
    "dora": ("llama", DoRA(rank=3, alpha=5, targets=EVERY)),
    "ia3": ("llama", IA3()),
    "ia3 layer 1": ("llama", IA3(layers=(1,))),
    "vera": ("llama", VeRA(rank=6, targets=EVERY)),
    "vera layer 0": ("llama", VeRA(rank=6, layers=(0,))),
    "bert lora": ("bert", LoRA(rank=2, targets=("query", "output", "up"))),
    "bert lora head": ("bert", LoRA(rank=2, targets=("output", "head.dense"))),
    "bert dora": ("bert", DoRA(rank=2, targets=ALL_LINEARS, layers=(1,))),
    "bert ia3": ("bert", IA3()),
    "bert vera": ("bert", VeRA(rank=6, targets=ALL_LINEARS)),
    "gpt2 lora": ("gpt2", LoRA(rank=3, alpha=5)),
    "gpt2 lora all": ("gpt2", LoRA(rank=3, alpha=5, targets=ALL_LINEARS)),
    "gpt2 rank-stabilised": ("gpt2", LoRA(rank=3, alpha=5, targets=ALL_LINEARS, rank_stabilized=True)),
    "gpt2 lora ranks": (
        "gpt2",
        LoRA(rank=4, alpha=8, targets=("query",)),
        LoRA(rank=2, alpha=4, targets=("value",)),
        LoRA(rank=1, alpha=3, targets=("down",), layers=(0,)),
    ),
    "gpt2 dora": ("gpt2", DoRA(rank=3, alpha=5)),
    "gpt2 dora all": ("gpt2", DoRA(rank=3, alpha=5, targets=ALL_LINEARS)),
    "gpt2 ia3": ("gpt2", IA3()),
    "gpt2 vera": ("gpt2", VeRA(rank=4, targets=("output", "up", "down"))),
}
# Their modules and the widths of their output and input.
LLAMA = {"self_attn.q_proj": (24, 24), "self_attn.v_proj": (12, 24), "mlp.down_proj": (24, 40)}
LLAMA = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LLAMA.items()}
BERT = {"attention.self.key": (24, 24), "attention.self.value": (24, 24), "output.dense": (24, 40)}
BERT = {f"bert.encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in BERT.items()}
GPT2 = {"attn.c_attn": (72, 24), "attn.c_proj": (24, 24), "mlp.c_proj": (24, 40)}
GPT2 = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in GPT2.items()}


def normal(*shape, seed):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(modules, ranks, **config):
    """A folder of theirs: `ranks` is the rank of every module, or one for each by the end of its name."""
    tensors = {}
    for seed, (module, (d_out, d_in)) in enumerate(modules.items()):
        r = ranks if isinstance(ranks, int) else next(r for end, r in ranks.items() if module.endswith(end))
        tensors[f"base_model.model.{module}.lora_A.weight"] = normal(r, d_in, seed=seed)
        tensors[f"base_model.model.{module}.lora_B.weight"] = normal(d_out, r, seed=seed + 50)
        if config.get("use_dora"):
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = 1 + normal(d_out, seed=seed + 90)
    targets = sorted({module.split(".", 3)[3] if "encoder" not in module else module for module in modules})
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": targets} | config, tensors


def ia3(outputs, inputs):
    """A folder of theirs that scales the outputs of some modules and the inputs of others."""
    tensors = {f"base_model.model.{m}.ia3_l": 1 + normal(d_out, 1, seed=i) for i, (m, (d_out, _)) in enumerate(outputs)}
    tensors |= {f"base_model.model.{m}.ia3_l": 1 + normal(1, d, seed=i) for i, (m, (_, d)) in enumerate(inputs, 50)}
    config = {"peft_type": "IA3", "feedforward_modules": [module for module, _ in inputs]}
    return config | {"target_modules": [module for module, _ in [*outputs, *inputs]]}, tensors


def vera(modules, rank=5):
    tensors = {f"base_model.model.{module}.vera_lambda_d": normal(rank, seed=i) for i, module in enumerate(modules)}
    for seed, (module, (d_out, _)) in enumerate(modules.items(), 50):
        tensors[f"base_model.model.{module}.vera_lambda_b"] = normal(d_out, seed=seed)
    widest = [max(sizes) for sizes in zip(*modules.values(), strict=True)]
    tensors |= {
        "base_model.vera_A": normal(rank, widest[1], seed=7),
        "base_model.vera_B": normal(widest[0], rank, seed=8),
    }
    return {"peft_type": "VERA", "r": rank, "target_modules": [*modules]}, tensors


PATTERNS = {
    "rank_pattern": {"v_proj": 1, "layers.1.mlp.down_proj": 4},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
}
RANKS = {"v_proj": 1, "1.mlp.down_proj": 4, "_proj": 2}
BERT_FFN = [entry for entry in BERT.items() if entry[0].endswith("output.dense")]
BERT_OUTPUT = [(name.replace("output", "attention.output"), (24, 24)) for name, _ in BERT_FFN]
BERT_KV = [entry for entry in BERT.items() if entry not in BERT_FFN]
GPT2_ATTENTION = [entry for entry in GPT2.items() if entry[0].endswith("c_attn")]
GPT2_FFN = [entry for entry in GPT2.items() if entry[0].endswith("mlp.c_proj")]
THEIRS = {
    "lora": ("llama", *lora(LLAMA, 2)),
    "lora patterns": ("llama", *lora(LLAMA, RANKS, **PATTERNS)),
    "lora layer 1": (
        "llama",
        *lora(
            {name: shape for name, shape in LLAMA.items() if ".1." in name}, 2,
            target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=1,
        ),
    ),
    "lora layer 0": (
        "llama",
        *lora(
            {name: shape for name, shape in LLAMA.items() if ".0." in name}, 2,
            target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[0], layers_pattern="layers",
        ),
    ),
    "lora but one": (
        "llama",
        *lora(
            {name: shape for name, shape in LLAMA.items() if "0.self_attn.v" not in name}, 2,
            exclude_modules=["layers.0.self_attn.v_proj"],
        ),
    ),
    "dora": ("llama", *lora(LLAMA, 2, use_dora=True, use_rslora=True, lora_dropout=0.1)),
    "vera": ("llama", *vera(LLAMA)),
    "bert lora": ("bert", *lora(BERT, 2)),
    "bert ia3": ("bert", *ia3(BERT_KV, BERT_FFN)),
    "bert ia3 as usual": ("bert", *ia3(BERT_KV, BERT_FFN + BERT_OUTPUT)),
    "gpt2 lora": ("gpt2", *lora(GPT2, 2, target_modules=["c_attn", "c_proj"])),
    "gpt2 dora": ("gpt2", *lora(GPT2, 2, target_modules=["c_attn", "c_proj"], use_dora=True)),
    "gpt2 ia3": ("gpt2", *ia3(GPT2_ATTENTION, GPT2_FFN)),
}  # fmt: skip


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", OURS)
def test_a_folder_computes_what_the_model_computes_and_leads_back_to_its_bits(case, tmp_path):
    family, *recipes = OURS[case]
    model = with_methods(built(family), *recipes)
    peft.to_huggingface(model, tmp_path / "folder")
    assert (logits(model) - logits(built(family))).abs().max() > 1e-2
    close(logits(model), logits(built(family, changed(state_dict(family)[0], *read(tmp_path / "folder")))))
    again = peft.from_huggingface(built(family), tmp_path / "folder")
    before, after = peft.state_dict(model), peft.state_dict(again)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("case", THEIRS)
def test_a_folder_of_theirs_is_read(case, tmp_path):
    family, config, tensors = THEIRS[case]
    model = peft.from_huggingface(built(family), write(tmp_path / "folder", config, tensors))
    assert (logits(model) - logits(built(family))).abs().max() > 1e-2
    close(logits(model), logits(built(family, changed(state_dict(family)[0], config, tensors))))
    peft.to_huggingface(model, tmp_path / "again")
    again = peft.from_huggingface(built(family), tmp_path / "again")
    assert torch.equal(logits(again), logits(model)) and peft.attached(again) == peft.attached(model)


def test_the_names_are_theirs(tmp_path):
    """Written out once, for one layer of each architecture."""
    bert = "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense"
    llama = "q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    expected = {
        ("llama", EVERY): f"self_attn.{llama}".split(),
        ("bert", ALL_LINEARS): f"{bert} output.dense".split(),
        ("gpt2", ALL_LINEARS): ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    }
    fronts = {"llama": "model.layers.", "bert": "bert.encoder.layer.", "gpt2": "transformer.h."}
    for (family, targets), modules in expected.items():
        model = with_methods(built(family), LoRA(rank=2, targets=targets, layers=(1,)))
        peft.to_huggingface(model, tmp_path / family)
        config, tensors = read(tmp_path / family)
        names = [f"base_model.model.{fronts[family]}1.{module}" for module in modules]
        assert {*tensors} == {f"{name}.lora_{factor}.weight" for name in names for factor in "AB"}
        assert {*config["target_modules"]} == {f"1.{module}" for module in modules}
        assert config["fan_in_fan_out"] == (family == "gpt2") and config["modules_to_save"] is None
        assert config["task_type"] == (None if family == "bert" else "CAUSAL_LM")


def test_targets_name_no_layer_that_only_theirs_has(tmp_path):
    """Every `dense` that ours has is chosen; BERT's pooler has one as well."""
    model = with_methods(built("bert"), LoRA(rank=2, targets=("output", "up", "down", "head.dense")))
    peft.to_huggingface(model, tmp_path / "folder")
    targets = read(tmp_path / "folder")[0]["target_modules"]
    assert targets == ["output.dense", "intermediate.dense", "transform.dense"]


def test_the_config_is_short_where_all_layers_are_alike(tmp_path):
    peft.to_huggingface(with_methods(built("llama"), LoRA(rank=3, alpha=5)), tmp_path / "folder", base_model="a/b")
    assert read(tmp_path / "folder")[0] == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b", "inference_mode": True,
        "r": 3, "lora_alpha": 5, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True,
        "fan_in_fan_out": False, "modules_to_save": None,
    }  # fmt: skip


def test_parts_of_c_attn_with_a_common_a_stay_narrow(tmp_path):
    """Apart from fused and back: no zeros, no stacked A."""
    family, config, tensors = THEIRS["gpt2 lora"]
    model = peft.from_huggingface(built(family), write(tmp_path / "folder", config, tensors))
    peft.to_huggingface(model, tmp_path / "again")
    written = read(tmp_path / "again")[1]
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_parts_with_a_common_a_and_two_scales_are_refused():
    A, B, linears = normal(2, 24, seed=0), normal(24, 2, seed=1), dict.fromkeys(PARTS, torch.nn.Linear(24, 24))
    with pytest.raises(ValueError, match="different scales"):
        joined({"query": Update(A, B, 4), "value": Update(A, B, 5)}, linears, stabilized=False, module="c_attn")


def test_stacked_parts_without_their_record_compute_the_same(tmp_path):
    """As another program leaves the file: then each part has all rows of A."""
    model = with_methods(built("gpt2"), LoRA(rank=3, alpha=5))
    peft.to_huggingface(model, tmp_path / "folder")
    config, tensors = read(tmp_path / "folder")
    again = peft.from_huggingface(built("gpt2"), write(tmp_path / "again", config, tensors, metadata={"format": "pt"}))
    assert peft.attached(again)[0].method == LoRA(rank=6, alpha=10, targets=("query", "key", "value"))
    close(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_the_head_of_a_classifier_travels(family, tmp_path):
    """Theirs scores each token; the scores of a row are the mean of these."""
    model = with_methods(classifier(family), LoRA(rank=2), train_also=("head",))
    peft.to_huggingface(model, tmp_path / "folder")
    config, tensors = read(tmp_path / "folder")
    name = "score" if family == "llama" else "classifier"
    assert config["task_type"] == "TOKEN_CLS" and config["modules_to_save"] == [name]
    assert torch.equal(tensors[f"base_model.model.{name}.weight"], model.head.weight)
    assert torch.equal(tensors[f"base_model.model.{name}.bias"], model.head.bias)
    again = peft.from_huggingface(classifier(family), tmp_path / "folder")
    assert torch.equal(logits(again), logits(model)) and peft.attached(again)[0].train_also == ("head",)


def test_a_language_model_head_of_its_own_travels(tmp_path):
    model = with_methods(built("llama"), LoRA(rank=2), train_also=("head",))
    peft.to_huggingface(model, tmp_path / "folder")
    config, tensors = read(tmp_path / "folder")
    assert config["modules_to_save"] == ["lm_head"]
    close(logits(model), logits(built("llama", changed(state_dict("llama")[0], config, tensors))))
    assert torch.equal(logits(peft.from_huggingface(built("llama"), tmp_path / "folder")), logits(model))

"""The forms in which state dicts are found: each is read to Hugging Face's numbers, or refused with the cure."""

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference.golden import read_golden
from torch import nn

from minitransformer.pretrained import from_bert, from_gpt2

GPT2, BERT = read_golden("huggingface_gpt2"), read_golden("huggingface_bert")
FAMILIES = {
    "gpt2": SimpleNamespace(
        read=from_gpt2,
        golden=GPT2,
        weights={name: GPT2.weight[name] for name in GPT2.names["GPT2LMHeadModel"]},
        base="transformer.",
        layer="h.0.",
        table="wte.weight",
        copy="lm_head.weight",
        inputs=(GPT2.input["tokens"],),
        real=torch.ones_like(GPT2.input["padding_mask"]),
    ),
    "bert": SimpleNamespace(
        read=from_bert,
        golden=BERT,
        weights={name: BERT.weight[name] for name in BERT.names["BertForMaskedLM"]},
        base="bert.",
        layer="encoder.layer.0.",
        table="embeddings.word_embeddings.weight",
        copy="cls.predictions.decoder.weight",
        inputs=tuple(BERT.input[name] for name in ("tokens", "padding_mask", "segments")),
        real=BERT.input["padding_mask"],
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def check_logits(family, checkpoint, atol=1e-4, **options):
    logits = family.read(checkpoint, family.golden.config, **options)(*family.inputs)
    expected = family.golden.output["logits"]
    torch.testing.assert_close(logits[family.real], expected[family.real], atol=atol, rtol=0)


def prefixed(prefix):
    return lambda family: {prefix + name: tensor for name, tensor in family.weights.items()}


def in_between(part):
    """As the state dict is where a layer was wrapped, and not the model."""
    return lambda family: {
        name.replace(family.layer, f"{family.layer}{part}."): tensor for name, tensor in family.weights.items()
    }


def beside_an_optimizer(family):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in family.weights.items())]
    return {
        "epoch": 3,
        "loss": torch.tensor(0.5),
        "module": family.weights,
        "optimizer": optimizer,
        "rng_state": torch.get_rng_state(),
        "param_shapes": shapes,
        "frozen_param_shapes": shapes[0],
        "args": {"lr": 1e-3},
    }


def changed(**how):
    """Tensors dropped (None), replaced or added; `table` and `copy` stand for the family's names of the tied weight."""

    def change(family):
        weights = dict(family.weights)
        for key, value in how.items():
            name = {"table": family.base + family.table, "copy": family.copy}.get(key, key)
            if value is None:
                del weights[name]
            else:
                weights[name] = value(weights[name]) if callable(value) else value
        return weights

    return change


READ = {
    "as saved": lambda family: family.weights,
    "DataParallel": prefixed("module."),
    "compile": prefixed("_orig_mod."),
    "compile in DDP": prefixed("module._orig_mod."),
    "DDP in compile": prefixed("_orig_mod.module."),
    "twice DataParallel": prefixed("module.module."),
    "Lightning": prefixed("model."),
    "Lightning, compiled": prefixed("model._orig_mod."),
    "Lightning's strategies": prefixed("_forward_module.model."),
    "Opacus": prefixed("_module."),
    "a part of a model": prefixed("backbone.model."),
    "of the base's own name": lambda family: prefixed(family.base)(family),
    "a place in a list": prefixed("0.auto_model."),
    "compiled layer": in_between("_orig_mod"),
    "FSDP layer": in_between("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "an average of models": lambda family: prefixed("module.")(family) | {"n_averaged": torch.tensor(3)},
    "state_dict": lambda family: {"state_dict": family.weights},
    "model": lambda family: {"model": OrderedDict(family.weights)},
    "in two dicts": lambda family: {"checkpoint": {"model_state_dict": prefixed("module.")(family)}},
    "beside an optimizer": beside_an_optimizer,
    "parameters": lambda family: {name: nn.Parameter(tensor) for name, tensor in family.weights.items()},
    "float64": lambda family: {name: tensor.double() for name, tensor in family.weights.items()},
    "not contiguous": lambda family: {n: t.mT.contiguous().mT if t.ndim == 2 else t for n, t in family.weights.items()},
    "without the copy": changed(copy=None),
    "the copy alone": changed(table=None),
    "the copy in another precision": lambda family: changed(copy=lambda t: t.double() * (1 + 1e-12))(family),
}  # fmt: skip


@pytest.mark.parametrize("form", READ.values(), ids=list(READ))
def test_a_form_is_read(family, form):
    check_logits(family, form(family))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_exactly_into_float32(family, dtype):
    half = {name: tensor.to(dtype) for name, tensor in family.weights.items()}
    model = family.read(half, family.golden.config)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.embedding.token.weight, half[family.base + family.table].float())


def test_the_biases_of_berts_words_are_read_from_either_name():
    family, bias = FAMILIES["bert"], "cls.predictions.decoder.bias"
    assert bias in family.weights
    check_logits(family, changed(**{bias: None})(family))
    check_logits(family, changed(**{"cls.predictions.bias": None})(family))
    only_copies = changed(**{"cls.predictions.bias": None}, table=None)(family)
    check_logits(family, {f"module.{name}": tensor for name, tensor in only_copies.items()})


def test_old_names_of_norms_are_read():
    family = FAMILIES["bert"]
    new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {}
    for name, tensor in family.weights.items():
        for ours, old in new.items():
            name = name.replace(ours, old)
        weights[name] = tensor
    buffers = {
        "bert.embeddings.position_ids": torch.arange(12)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 12),
    }
    check_logits(family, weights | buffers)
    with pytest.raises(ValueError, match=r"stand for one tensor, 'embeddings.LayerNorm.weight'; pass one of them"):
        from_bert(weights | {"bert.embeddings.LayerNorm.weight": torch.ones(24)}, BERT.config)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_causal_masks_are_no_weights(prefix):
    bare = {name: GPT2.weight[f"transformer.{name}"] for name in GPT2.names["GPT2Model"]}
    masks = {f"h.{i}.attn.bias": torch.ones(12, 12).tril().bool()[None, None] for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    check_logits(FAMILIES["gpt2"], {prefix + name: tensor for name, tensor in (bare | masks).items()})


REFUSED = {
    "two models": (lambda f: prefixed("a.")(f) | f.weights, "begin with .* and .*; pass the state dict of one model"),
    "two state dicts": (
        lambda f: {"model": f.weights, "ema": {"shadow": f.weights}},
        "holds 2 state dicts, 'model', 'ema.shadow'; pass one",
    ),
    "a head beside": (
        lambda f: {"model": f.weights, "head": {"weight": torch.zeros(2, 24)}},
        "holds 'head.weight' beside the state dict 'model'; pass the state dict alone",
    ),
    "another architecture": (
        lambda f: {name.replace(f.base, "roberta."): tensor for name, tensor in f.weights.items()},
        r"begin with 'roberta\.', and 'roberta' is not known to hold a .*; if it does, cut it off: {name.removeprefix",
    ),
    "one name in two wrappings": (
        lambda f: f.weights | {f"module.{f.copy}": f.weights[f.copy]},
        "stand for one tensor, .*; pass one of them",
    ),
    "foreign names": (
        lambda f: {"tok_embeddings.weight": torch.zeros(40, 24)},
        "no tensor has a name of a .*there is 'tok_embeddings.weight': choose a .* in Hugging Face's form",
    ),
    "nothing": (lambda f: {}, "no tensor has a name of a .*there is nothing"),
    "a module": (lambda f: nn.Linear(1, 1), r"maps names to tensors, got Linear; pass model.state_dict\(\)"),
    "a path": (lambda f: "pytorch_model.bin", "got str; .* a folder of files to from_pretrained"),
    "a name that is a number": (lambda f: f.weights | {0: torch.zeros(1)}, "0 is no name of a tensor; take it out"),
    "other copy": (changed(copy=lambda t: t + 1e-3), "differs from .*choose a tied checkpoint, or leave the head out"),
    "copy of other shape": (changed(copy=torch.zeros(41, 24)), "differs from .*choose a tied"),
    "numpy": (changed(table=np.zeros((40, 24))), r"is no tensor but ndarray; make it one \(torch.as_tensor\)"),
    "list": (changed(table=[[0.0]]), "is no tensor but list; make it one"),
    "a dict among tensors": (changed(optimizer={"state": {}}), "'optimizer' is no tensor but dict; .* take it out"),
    "integers": (changed(table=lambda t: t.to(torch.int8)), "has the type torch.int8, but weights are float16"),
    "complex": (changed(table=torch.zeros(40, 24, dtype=torch.complex64)), "has the type torch.complex64, but"),
    "float8": (changed(table=lambda t: t.to(torch.float8_e4m3fn)), "has the type torch.float8_e4m3fn, but"),
    "sparse": (changed(table=lambda t: t.to_sparse()), r"is not dense \(torch.sparse_coo\); call to_dense\(\)"),
    "no data": (changed(table=lambda t: t.to("meta")), r"has no data \(device meta\); load the weights"),
    "not a number": (changed(table=lambda t: t.clone().fill_(float("nan"))), "not finite; the file is damaged"),
    "overflowed": (changed(table=lambda t: (t * 1e38 * 10).float()), "not finite"),
    "padded vocabulary": (
        changed(table=torch.zeros(48, 24), copy=None),
        r"has shape \(48, 24\), but config says \(40, 24\); if the vocabulary is padded, say so by vocab_size=48",
    ),
    "a shape cut short": (changed(table=torch.zeros(39, 24), copy=None), "must be of one checkpoint"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("form, message", REFUSED.values(), ids=list(REFUSED))
def test_a_form_is_refused(family, form, message):
    with pytest.raises(ValueError, match=message):
        family.read(form(family), family.golden.config)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_types_that_only_their_library_reads_are_refused(family):
    class Packed(torch.Tensor):
        pass

    quantised = torch.quantize_per_tensor(torch.zeros(40, 24), 0.1, 0, torch.qint8)
    for tensor, message in (
        (torch.zeros(40, 24).as_subclass(Packed), "is a Packed; make it a plain"),
        (quantised, "quantised"),
    ):
        with pytest.raises(ValueError, match=message):
            family.read(changed(table=tensor, copy=None)(family), family.golden.config)


@pytest.mark.parametrize(
    "name, way_back",
    [
        (
            "{base}{layer}x.lora_A.default.weight",
            r"belongs to an adapter; merge it where it was made \(merge_and_unload",
        ),
        ("base_model.model.{base}{layer}x.base_layer.weight", "belongs to an adapter"),
        ("{base}{layer}x.qweight", "belongs to quantised weights; choose the checkpoint before"),
        ("{base}{layer}x.weight.quant_state.bitsandbytes__nf4", "belongs to quantised weights"),
        ("{base}{layer}x.SCB", "belongs to quantised weights"),
        ("{base}{layer}_flat_param", "is a part of flattened weights; gather them"),
        ("{base}{layer}x.parametrizations.weight.original0", "is a parametrisation of a weight; remove it"),
        ("{base}{layer}x.weight_orig", "is a parametrisation of a weight"),
        ("{base}{layer}crossattention.c_attn.weight", "belongs to cross-attention"),
        ("{base}{layer}attention.self.distance_embedding.weight", "belongs to relative positions"),
        ("{base}{layer}something_else", "unexpected tensors: "),
    ],
)
def test_names_that_no_plain_model_has_are_refused_with_the_way_back(family, name, way_back):
    name = name.format(base=family.base, layer=family.layer)
    weights = prefixed("base_model.model.")(family) if name.startswith("base_model.") else family.weights
    with pytest.raises(ValueError, match=way_back):
        family.read(weights | {name: torch.zeros(24)}, family.golden.config)


def test_a_head_is_left_out_on_demand_and_never_silently(family):
    weights = family.weights | {"classifier.weight": torch.zeros(2, 24), "classifier.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"classifier.bias, classifier.weight; .*\(leave_out=\('classifier.',\)\)"):
        family.read(weights, family.golden.config)
    check_logits(family, weights, leave_out=("classifier.",))
    with pytest.raises(ValueError, match=r"leave_out names 'clasifier.', but no tensor's name begins so"):
        family.read(weights, family.golden.config, leave_out=("clasifier.",))


def test_tensors_of_other_names_are_named_beside_those_that_are_lacking():
    """As in NVIDIA's files, whose dense layer before the activation is called so."""
    weights = {name.replace("intermediate.dense", "intermediate.dense_act"): t for name, t in BERT.weight.items()}
    message = r"lacks .*intermediate\.dense\.bias.*, and has .* encoder\.layer\.0\.intermediate\.dense_act\.bias"
    with pytest.raises(ValueError, match=message):
        from_bert(weights, BERT.config)


def test_a_head_of_its_own_weight_is_refused_and_leaves_hidden_states(family):
    config = family.golden.config | {"tie_word_embeddings": False}
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings=False, but only True .*leave_out=\('(lm_head|cls)\.',\)"
    ):
        family.read(family.weights, config)
    begins = f"{family.copy.partition('.')[0]}."
    other = changed(copy=lambda t: t + 1)(family)
    for model in (
        family.read(other, config, leave_out=(begins,)),
        family.read(other, family.golden.config, leave_out=(begins,)),
        family.read({name: t for name, t in other.items() if not name.startswith(begins)}, config),
    ):
        assert model.config.lm_head == "none"
        assert model.hidden(*family.inputs).isfinite().all()
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        family.read(changed(table=None)(family), config)


def test_linear_layers_in_the_other_order_are_refused():
    """A file with c_attn as [3 d, d] is in the order of nn.Linear, but its square c_proj does not tell."""
    linear = {
        n: t.T if n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else t for n, t in GPT2.weight.items()
    }
    message = r"c_attn.weight .transposed.' has shape \(24, 72\), .*it is the transpose; .* the square ones as well"
    with pytest.raises(ValueError, match=message):
        from_gpt2(linear, GPT2.config)
    up = "bert.encoder.layer.0.intermediate.dense.weight"
    with pytest.raises(ValueError, match=r"has shape \(24, 40\), but config says \(40, 24\); it is the transpose"):
        from_bert(changed(**{up: lambda t: t.T})(FAMILIES["bert"]), BERT.config)


def test_no_memory_is_taken_before_the_shapes_are_known_to_fit(family):
    with pytest.raises(ValueError, match=r"has shape \(40, 24\), but config says \(999999999, 24\)"):
        family.read(family.weights, family.golden.config | {"vocab_size": 999_999_999})
    depth = "n_layer" if "n_layer" in family.golden.config else "num_hidden_layers"
    with pytest.raises(ValueError, match=r"config says 10000 layers, but the state dict has \d+ tensors"):
        family.read(family.weights, family.golden.config | {depth: 10_000})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": "40"}, "vocab_size='40', which is no size"),
        ({"vocab_size": True}, "vocab_size=True, which is no size"),
        ({"vocab_size": 0}, "vocab_size=0, which is no size"),
        ({"vocab_size": 2**60}, "vocab_size=1152921504606846976, which is no size"),
        ({"layer_norm_eps": "1e-12", "layer_norm_epsilon": "1e-5"}, "='1e-(12|5)', which is no number; pass"),
        ({"attn_pdrop": [], "hidden_dropout_prob": []}, r"=\[\], which is no number"),
        ({"activation_function": [], "hidden_act": []}, r"the activation \[\] is not supported"),
        ({"n_inner": 0.5, "type_vocab_size": 0.5}, "=0.5, which is no size"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config=.* but only False is supported"),
        ({"add_cross_attention": True}, "add_cross_attention=True, which is not computed"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True, which is not computed"),
        ({"alibi": True}, "alibi=True, which is not computed; choose a checkpoint without it"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0, which is not computed"),
        ({"num_local_experts": 8}, "num_local_experts=8, which is not computed"),
        (
            {"model_type": None, "architectures": ["RobertaModel"]},
            r"model_type=None and architectures=\['RobertaModel'\], but only",
        ),
        (None, r"config is a dict, the contents of config.json, got Linear; .* call to_dict\(\)"),
    ],
)
def test_a_config_that_is_none_of_ours_is_refused(family, change, message):
    config = (
        nn.Linear(1, 1)
        if change is None
        else {k: v for k, v in (family.golden.config | change).items() if v is not None}
    )
    with pytest.raises(ValueError, match=message):
        family.read(family.weights, config)


def test_gpt2s_sizes_may_have_the_names_of_other_configs():
    aliases = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings"}
    aliases |= {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    config = {aliases.get(name, name): value for name, value in GPT2.config.items()}
    logits = from_gpt2(FAMILIES["gpt2"].weights, config)(GPT2.input["tokens"])
    torch.testing.assert_close(logits, GPT2.output["logits"], atol=1e-4, rtol=0)
    from_gpt2(FAMILIES["gpt2"].weights, GPT2.config | {"hidden_size": 24, "reorder_and_upcast_attn": True})
    with pytest.raises(ValueError, match="hidden_size=48 and n_embd=24, which are one; keep the right one"):
        from_gpt2(FAMILIES["gpt2"].weights, GPT2.config | {"hidden_size": 48})


def test_options_that_are_left_out_have_hugging_faces_defaults():
    optional = {
        "type_vocab_size",
        "hidden_act",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    }
    optional |= {"activation_function", "layer_norm_epsilon", "resid_pdrop", "embd_pdrop", "attn_pdrop", "model_type"}
    for family in FAMILIES.values():
        config = {name: value for name, value in family.golden.config.items() if name not in optional}
        model, whole = family.read(family.weights, config), family.read(family.weights, family.golden.config)
        assert model.config == whole.config

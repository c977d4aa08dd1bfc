"""GPT-2, from Hugging Face's weights into our decoder.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3: a causal pre-norm
Transformer whose language-model head is the transposed word embedding.

Two habits of the released code show in the file: a linear layer stores its weight as [in, out] (`Conv1D`), and one
layer, `c_attn`, computes query, key and value side by side, [d_model, 3 d_model].
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minitransformer.config import TransformerConfig
from minitransformer.pretrained.huggingface import (
    Writer,
    check_options,
    check_shape,
    check_tied,
    filled,
    read_activation,
    read_dropout,
    read_number,
    read_sizes,
    written_activation,
    written_sizes,
)
from minitransformer.pretrained.state_dict import Form, check_weights, left_out, one_of_each, plain_tensors
from minitransformer.transformer import Transformer

FORM = Form(
    model="GPT-2",
    model_type="gpt2",
    classes=r"GPT2(Model|LMHeadModel|DoubleHeadsModel|For\w+)",
    base="transformer",
    roots=r"wte\.|wpe\.|h\.\d+\.|ln_f\.",
    example="wte.weight",
    not_used=r"h\.\d+\.attn\.(bias|masked_bias)$",  # the causal mask, stored in older files
)

# Our module -> Hugging Face's, once `c_attn` is split and the linear layers are transposed.
EMBEDDING = {
    "embedding.token": "wte",
    "embedding.position": "wpe",
}
BLOCK = {  # below blocks.{i} and h.{i}
    "norm_attention": "ln_1",
    "attention.query": "attn.c_attn.query",
    "attention.key": "attn.c_attn.key",
    "attention.value": "attn.c_attn.value",
    "attention.output": "attn.c_proj",
    "norm_feedforward": "ln_2",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}
LAST = {"norm": "ln_f"}
PARTS = ("query", "key", "value")  # of c_attn, in this order
HEAD = "lm_head.weight"
COPIES = {HEAD: "wte.weight"}  # of the tied weight: either or both may be saved

SIZES = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "max_len": "n_positions",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
SUPPORTED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
ALIASES = {  # names that Hugging Face takes as well
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def from_gpt2(state_dict: Mapping[str, Any], config: Mapping[str, Any], leave_out: tuple[str, ...] = ()) -> Transformer:
    """A GPT-2 with these weights, float32, in evaluation mode (`fit` switches to training by itself).

    Args:
        state_dict: of `GPT2Model` or a class on top of it, names as Hugging Face writes them. What training puts round
            a model (`module.`, `_orig_mod.`, `model.`) or a state dict ({"state_dict": …}) is seen through. The head is
            tied, saved or not; where the config says that it is not, or it is left out, the model gives hidden states
            only (lm_head="none").
        config: the contents of config.json.
        leave_out: beginnings of names, as messages give them, that are not wanted: ("score.",) or ("lm_head.",).

    Raises:
        ValueError: an option that we do not compute; a tensor that is missing, unexpected, of a wrong shape, or no
            weight; tied weights that differ; a beginning in `leave_out` that no name has.
    """
    config = _with_their_names(config)
    check_options(config, FORM, SIZES.values(), SUPPORTED, optional=("n_inner",))
    saved = plain_tensors(state_dict, FORM)
    tensors = left_out(saved, leave_out)
    check_weights(tensors)
    if HEAD in tensors:
        check_tied(config, "lm_head.")
    is_tied = HEAD in tensors or (HEAD not in saved and config.get("tie_word_embeddings", True))
    pieces = _split(_transposed(one_of_each(tensors, COPIES)), config["n_embd"])
    return filled(_our_config(config, "tied" if is_tied else "none"), pieces, names)


def _with_their_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config without aliases.

    Raises:
        ValueError: an option has one value under its name and another under an alias.
    """
    if not isinstance(config, Mapping):
        return config  # `check_options` says what is wanted
    config = dict(config)
    for alias, name in ALIASES.items():
        value = config.pop(alias, None)
        if value is not None and config.setdefault(name, value) != value:
            raise ValueError(
                f"config has {alias}={value!r} and {name}={config[name]!r}, which are one; keep the right one"
            )
    return config


def _transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the linear layers from [in, out] to [out, in]."""
    linear = re.compile(r"\.c_(attn|proj|fc)\.weight$")
    return {name: t.T if linear.search(name) and t.ndim == 2 else t for name, t in tensors.items()}


def _split(tensors: dict[str, Tensor], d_model: int) -> dict[str, Tensor]:
    """Each fused layer cut into query's, key's and value's: weights [d_model, d_model], biases [d_model]."""
    split = {}
    for name, tensor in tensors.items():
        fused, c_attn, last = name.rpartition("c_attn.")  # last: weight or bias
        if not c_attn:
            split[name] = tensor
            continue
        expected = (3 * d_model, d_model) if last == "weight" else (3 * d_model,)
        check_shape(f"{name} (transposed)", tensor, expected)
        for part, piece in zip(PARTS, tensor.split(d_model), strict=True):
            split[f"{fused}c_attn.{part}.{last}"] = piece
    return split


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value fused again, and weights [in, out]: `_split` and `_transposed` undone."""
    joined = {name: tensor for name, tensor in tensors.items() if "c_attn." not in name}
    for name in tensors:
        fused, query, last = name.rpartition("query.")
        if query:
            joined[fused + last] = torch.cat([tensors[f"{fused}{part}.{last}"] for part in PARTS])
    return _transposed(joined)


def names(n_layers: int) -> dict[str, str]:
    """Our module -> Hugging Face's, below `transformer`."""
    layers = {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for i in range(n_layers) for ours, theirs in BLOCK.items()}
    return EMBEDDING | layers | LAST


def _our_config(config: Mapping[str, Any], lm_head: str) -> TransformerConfig:
    return TransformerConfig(
        **read_sizes(config, SIZES),
        d_ff=config.get("n_inner") or 4 * config["n_embd"],
        dropout=read_dropout(config, ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        causal=True,
        norm="pre",
        activation=read_activation(config.get("activation_function", "gelu_new")),
        norm_eps=read_number(config, "layer_norm_epsilon", 1e-5),
        lm_head=lm_head,
    )


def _their_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **written_sizes(config, SIZES),
        "n_inner": config.d_ff,
        "activation_function": written_activation(config.activation),
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
    }


WRITER = Writer(FORM, {"tied": "GPT2LMHeadModel", "none": "GPT2Model"}, _their_config, _our_config, names, _joined)

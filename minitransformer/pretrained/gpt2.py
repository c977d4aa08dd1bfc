"""GPT-2, from Hugging Face's weights into our decoder.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3: a causal pre-norm
Transformer whose language-model head is the transposed word embedding.

Two habits of the released code show in the file: a linear map stores its weight as [in, out] (`Conv1D`), and one map,
`c_attn`, computes query, key and value side by side, [d_model, 3 d_model].
"""

import re

from torch import Tensor

from minitransformer.config import TransformerConfig
from minitransformer.pretrained.huggingface import (
    check_options,
    check_shape,
    fill,
    read_activation,
    read_dropout,
    without_copies,
    without_prefix,
)
from minitransformer.transformer import Transformer

# Our module -> Hugging Face's, once `c_attn` is split and the linear maps are transposed.
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
COPIES = {"lm_head.weight": "wte.weight"}
MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, stored in older files

SIZES = ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")
SUPPORTED = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": False,  # as is an empty dict
}


def from_gpt2(state_dict: dict[str, Tensor], config: dict) -> Transformer:
    """A GPT-2 with these weights, in evaluation mode (`fit` switches to training by itself).

    Args:
        state_dict: of `GPT2Model` or `GPT2LMHeadModel`, names as Hugging Face writes them, with or without the
            prefix "transformer.".
        config: the contents of config.json.

    Raises:
        ValueError: an option that we do not compute; a tensor that is missing, unexpected, or of a wrong shape.
    """
    check_options(config, SIZES, SUPPORTED)
    model = Transformer(_our_config(config))
    tensors = without_copies(without_prefix(state_dict, "transformer."), COPIES)
    tensors = {name: tensor for name, tensor in tensors.items() if not MASK_BUFFERS.fullmatch(name)}
    fill(model, _split(_transposed(tensors), config["n_embd"]), _names(config["n_layer"]))
    return model.eval()


def _transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the linear maps from [in, out] to [out, in]."""
    return {name: t.T if re.search(r"\.c_(attn|proj|fc)\.weight$", name) else t for name, t in tensors.items()}


def _split(tensors: dict[str, Tensor], d_model: int) -> dict[str, Tensor]:
    """Each fused map cut into the query's, the key's and the value's: weights [d_model, d_model], biases [d_model]."""
    split = {}
    for name, tensor in tensors.items():
        fused, c_attn, last = name.rpartition("c_attn.")  # last: weight or bias
        if not c_attn:
            split[name] = tensor
            continue
        expected = (3 * d_model, d_model) if last == "weight" else (3 * d_model,)
        check_shape(f"{name} (transposed)", tensor, expected)
        for part, piece in zip(("query", "key", "value"), tensor.split(d_model), strict=True):
            split[f"{fused}c_attn.{part}.{last}"] = piece
    return split


def _names(n_layers: int) -> dict[str, str]:
    layers = {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for i in range(n_layers) for ours, theirs in BLOCK.items()}
    return EMBEDDING | layers | LAST


def _our_config(config: dict) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        max_len=config["n_positions"],
        d_model=config["n_embd"],
        n_heads=config["n_head"],
        n_layers=config["n_layer"],
        d_ff=config.get("n_inner") or 4 * config["n_embd"],
        dropout=read_dropout(config, ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        causal=True,
        norm="pre",
        activation=read_activation(config.get("activation_function", "gelu_new")),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        lm_head="tied",
    )

"""BERT, from Hugging Face's weights into our encoder.

Source: Devlin et al. 2019, "BERT", sections 3 and 3.1: a bidirectional post-norm Transformer with segment embeddings;
the sum of the embeddings is normalised; the masked language model's head is tied to the word embeddings.

Left out knowingly: the pooler and the next-sentence head, which sit on top of the hidden states.
"""

from collections.abc import Mapping
from typing import Any

from minitransformer.config import TransformerConfig
from minitransformer.pretrained.huggingface import (
    SIZES,
    Writer,
    check_options,
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
    model="BERT",
    model_type="bert",
    classes=r"Bert(Model|LMHeadModel|For\w+)",
    base="bert",
    roots=r"embeddings\.|encoder\.layer\.\d+\.",
    example="embeddings.word_embeddings.weight",
    not_used=r"pooler\.|cls\.seq_relationship\.|embeddings\.(position_ids|token_type_ids)$",
)

# Our module -> Hugging Face's.
EMBEDDING = {
    "embedding.token": "embeddings.word_embeddings",
    "embedding.position": "embeddings.position_embeddings",
    "embedding.segment": "embeddings.token_type_embeddings",
    "embedding.norm": "embeddings.LayerNorm",
}
BLOCK = {  # below blocks.{i} and encoder.layer.{i}
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "norm_attention": "attention.output.LayerNorm",
    "feedforward.up": "intermediate.dense",
    "feedforward.down": "output.dense",
    "norm_feedforward": "output.LayerNorm",
}
HEAD = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",  # its bias, one number for each word
}
COPIES = {  # of tied weights: either or both may be saved
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

SUPPORTED = {"position_embedding_type": "absolute", "is_decoder": False}


def from_bert(state_dict: Mapping[str, Any], config: Mapping[str, Any], leave_out: tuple[str, ...] = ()) -> Transformer:
    """A BERT with these weights, float32, in evaluation mode (`fit` switches to training by itself).

    Args:
        state_dict: of `BertModel` or a class on top of it, names as Hugging Face writes them. What training puts round
            a model (`module.`, `_orig_mod.`, `model.`) or a state dict ({"state_dict": …}) is seen through. With
            `cls.predictions.*` the model scores words (lm_head="bert"); without, it gives hidden states only
            (lm_head="none").
        config: the contents of config.json.
        leave_out: beginnings of names, as messages give them, that are not wanted: ("classifier.",) or ("cls.",).

    Raises:
        ValueError: an option that we do not compute; a tensor that is missing, unexpected, of a wrong shape, or no
            weight; tied weights that differ; a beginning in `leave_out` that no name has.
    """
    check_options(config, FORM, SIZES.values(), SUPPORTED, optional=("type_vocab_size",))
    tensors = left_out(plain_tensors(state_dict, FORM), leave_out)
    check_weights(tensors)
    if has_head := any(name.startswith("cls.predictions.") for name in tensors):
        check_tied(config, "cls.")
    our_config = _our_config(config, "bert" if has_head else "none")
    return filled(our_config, one_of_each(tensors, COPIES), names)


def names(n_layers: int) -> dict[str, str]:
    """Our module -> Hugging Face's: all are below `bert`, but for the head's."""
    layers = {
        f"blocks.{i}.{ours}": f"encoder.layer.{i}.{theirs}" for i in range(n_layers) for ours, theirs in BLOCK.items()
    }
    return EMBEDDING | layers | HEAD


def _our_config(config: Mapping[str, Any], lm_head: str) -> TransformerConfig:
    return TransformerConfig(
        **read_sizes(config, SIZES),
        dropout=read_dropout(config, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        causal=False,
        norm="post",
        activation=read_activation(config.get("hidden_act", "gelu")),
        norm_eps=read_number(config, "layer_norm_eps", 1e-12),
        n_segments=config.get("type_vocab_size", 2),
        embedding_norm=True,
        lm_head=lm_head,
    )


def _their_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **written_sizes(config, SIZES),
        "hidden_act": written_activation(config.activation),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "layer_norm_eps": config.norm_eps,
        **({"type_vocab_size": config.n_segments} if config.n_segments else {}),
    }


WRITER = Writer(FORM, {"bert": "BertForMaskedLM", "none": "BertModel"}, _their_config, _our_config, names)

"""BERT, from Hugging Face's weights into our encoder.

Source: Devlin et al. 2019, "BERT", sections 3 and 3.1: a bidirectional post-norm Transformer with segment embeddings;
the sum of the embeddings is normalised; the masked language model's head is tied to the word embeddings.

Left out knowingly: the pooler and the next-sentence head, which sit on top of the hidden states.
"""

from torch import Tensor

from minitransformer.config import TransformerConfig
from minitransformer.pretrained.huggingface import (
    check_options,
    fill,
    read_activation,
    read_dropout,
    without_copies,
    without_prefix,
)
from minitransformer.transformer import Transformer

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
    "head": "cls.predictions",  # its bias, one number per word
}
COPIES = {  # repeated in older files
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
NOT_USED = ("pooler.", "cls.seq_relationship.", "embeddings.position_ids")

SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
)
SUPPORTED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": False,  # as is an empty dict
}


def from_bert(state_dict: dict[str, Tensor], config: dict) -> Transformer:
    """A BERT with these weights, in evaluation mode (`fit` switches to training by itself).

    Args:
        state_dict: of `BertModel`, `BertForMaskedLM` or `BertForPreTraining`, names as Hugging Face writes them,
            with or without the prefix "bert.". With `cls.predictions.*` the model scores words (lm_head="bert");
            without, it gives hidden states only (lm_head="none").
        config: the contents of config.json.

    Raises:
        ValueError: an option that we do not compute; a tensor that is missing, unexpected, or of a wrong shape.
    """
    tensors = _used(state_dict)
    has_head = any(name.startswith("cls.predictions.") for name in state_dict)
    check_options(config, SIZES, SUPPORTED | ({"tie_word_embeddings": True} if has_head else {}))
    model = Transformer(_our_config(config, "bert" if has_head else "none"))
    fill(model, tensors, _names(config["num_hidden_layers"]))
    return model.eval()


def _used(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have a place in our model."""
    tensors = {_modern(name): tensor for name, tensor in without_prefix(state_dict, "bert.").items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_USED)}
    return without_copies(tensors, COPIES)


def _modern(name: str) -> str:
    """The first BERT files call a LayerNorm's weight and bias gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _names(n_layers: int) -> dict[str, str]:
    layers = {
        f"blocks.{i}.{ours}": f"encoder.layer.{i}.{theirs}" for i in range(n_layers) for ours, theirs in BLOCK.items()
    }
    return EMBEDDING | layers | HEAD


def _our_config(config: dict, lm_head: str) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        max_len=config["max_position_embeddings"],
        d_model=config["hidden_size"],
        n_heads=config["num_attention_heads"],
        n_layers=config["num_hidden_layers"],
        d_ff=config["intermediate_size"],
        dropout=read_dropout(config, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        causal=False,
        norm="post",
        activation=read_activation(config.get("hidden_act", "gelu")),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        n_segments=config.get("type_vocab_size", 2),
        embedding_norm=True,
        lm_head=lm_head,
    )

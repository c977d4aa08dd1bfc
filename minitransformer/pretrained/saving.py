"""A Transformer as a checkpoint in Hugging Face's form: what `from_pretrained` reads, the other way round.

Each architecture's reader says, of the config that its writer made, which model it would build. Only where this is the
very model is it written; so what an architecture does not have, such as a scale of the logits, is found without a list.
"""

import json
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from minitransformer.files import write_folder
from minitransformer.pretrained import bert, gpt2, llama
from minitransformer.pretrained.huggingface import NothingDrawn, Writer
from minitransformer.pretrained.state_dict import check_weights
from minitransformer.transformer import Transformer

WRITERS = (bert.WRITER, gpt2.WRITER, *llama.WRITERS)
NO_PART = {"attention", "gradient_checkpointing", "init"}  # in what a trained model computes
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # a tokenizer's: the model knows none


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write config.json and model.safetensors, as Hugging Face's transformers reads them, and `from_pretrained`.

    Weights keep their type, which the config says (of several, the one that holds all). A tied head is not written
    twice. A BERT has no pooler here, which transformers draws at random where it finds none. The tokenizer, and which
    of its tokens begin and end a text, are no part of a model. Where padding stands on the left, transformers counts it
    as positions of a BERT or a GPT-2, unless it is given `position_ids`.

    Args:
        model: a plain Transformer of the shape of BERT, GPT-2, Llama or Qwen2.
        folder: absent or empty; written whole or not at all.

    Raises:
        ValueError: a model that is not plain, such as one with methods attached; one that none of these architectures
            computes, with what is different; weights that are not finite or quantised.
        OSError: the folder is there and not empty, or cannot be written.
    """
    check_plain(model)
    writer = writer_of(model.config)
    tensors = _theirs(model, writer)
    data = serialize(tensors, metadata={"format": "pt"})
    config = json.dumps(_config(model, writer), indent=2)
    write_folder(folder, {"config.json": f"{config}\n".encode(), "model.safetensors": data})


def check_plain(model: nn.Module) -> None:
    """Raise ValueError unless every module and tensor is the one that a fresh Transformer of its config has."""
    if type(model) is not Transformer:
        raise ValueError(
            f"only a Transformer can be written, got {type(model).__name__}; pass the Transformer in it, of a model "
            f"with a head on top model.transformer"
        )
    with torch.device("meta"), NothingDrawn():
        fresh = Transformer(model.config)
    expected, given = ({name: type(module) for name, module in m.named_modules()} for m in (fresh, model))
    for name in [name for name in given if expected.get(name) is not given[name]]:
        raise ValueError(
            f"{name} is a {given[name].__name__}, so this is no plain Transformer; dequantize(model) where it is "
            f"quantised, write merged_copy(model) where an update is attached that a weight can hold, else "
            f"detach(model) first"
        )
    expected, given = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (fresh, model))
    for name in [name for name in given.keys() | expected.keys() if expected.get(name) != given.get(name)]:
        raise ValueError(
            f"{name} has shape {given.get(name)}, but the model's config says {expected.get(name)}; build the model "
            f"anew with a config that fits"
        )
    check_weights(model.state_dict())


def writer_of(config: TransformerConfig) -> Writer:
    """Of the architecture that computes just this; ValueError, with what is different, if there is none."""
    misfits = [_misfits(config, writer) for writer in WRITERS]
    nearest = min(range(len(WRITERS)), key=lambda i: len(misfits[i]))
    if misfits[nearest]:
        raise ValueError(
            f"none of Hugging Face's {', '.join(writer.form.model for writer in WRITERS)} computes this; the nearest, "
            f"{WRITERS[nearest].form.model}, has {'; '.join(misfits[nearest])}. Keep such a model by "
            f"torch.save(model.state_dict(), …) beside its config"
        )
    return WRITERS[nearest]


def _misfits(config: TransformerConfig, writer: Writer) -> list[str]:
    """What the architecture's reader would make otherwise of what its writer says."""
    lm_head = config.lm_head if config.lm_head in writer.classes else "none"
    read = writer.our_config(writer.their_config(config), lm_head)
    names = [field.name for field in fields(config) if field.name not in NO_PART | {"n_kv_heads", "head_dim"}]
    pairs = {name: (getattr(read, name), getattr(config, name)) for name in (*names, "d_kv", "d_head")}
    return [f"{name}={theirs!r} and not {ours!r}" for name, (theirs, ours) in pairs.items() if theirs != ours]


def _config(model: Transformer, writer: Writer) -> dict[str, Any]:
    """What config.json says."""
    lm_head, form = model.config.lm_head, writer.form
    dtype = reduce(torch.promote_types, [tensor.dtype for tensor in model.state_dict().values()])
    return {
        "architectures": [writer.classes[lm_head]],
        "model_type": form.model_type,
        **writer.their_config(model.config),
        "tie_word_embeddings": lm_head in ("tied", "bert"),
        **SPECIAL,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _theirs(model: Transformer, writer: Writer) -> dict[str, Tensor]:
    """The tensors under their names and in their layout, each with memory of its own."""
    their_modules, base = writer.names(model.config.n_layers), writer.form.base
    tensors = {}
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        below = f"{base}." if model.config.lm_head != "none" and module.partition(".")[0] != "head" else ""
        tensors[f"{below}{their_modules[module]}.{last}"] = tensor.cpu()
    laid_out = writer.joined(tensors).items()
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in laid_out}

"""Prefix and prompt tuning in Hugging Face's form (peft_type PREFIX_TUNING and PROMPT_TUNING).

    prompt_embeddings    [n, n_layers 2 d_kv]    for each layer the keys and then the values
                         [n, d_model]            our prompt

**Positions.** Behind a prefix, their text stands at positions n, n + 1, …, ours at 0, 1, … With rotary positions a
score depends on the difference alone, so their key is ours turned by n positions, k' = R(n) k, and outputs are the
same. With learned positions there is no such key, and the exchange is refused. Where a batch has padding on the left,
theirs count it as positions: texts without it compare.

A prompt takes positions in both libraries. Their logits have those of the prompt in front.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.position import rotated
from peft.exchange.contents import Found, Written, check_shape
from peft.exchange.names import Names
from peft.exchange.options import Options
from peft.methods.prefix import PrefixAttention, PrefixTuning
from peft.methods.prompt import PromptEmbedding, PromptTuning

NAME = "prompt_embeddings"


def written_prefix(wrappers: dict[str, PrefixAttention], names: Names) -> Written:
    """The folder's contents for the prefixes of all layers.

    Raises:
        ValueError: learned positions or a classifier, which theirs cannot run; a prefix that is more than keys and
            values, or is not in every layer.
    """
    _require_rotary(names)
    if names.root:
        raise ValueError(
            "Hugging Face's peft runs no prefix in a classifier of the Llama family; choose LoRA or a prompt"
        )
    config = names.config
    for recipe in [wrapper.recipe for wrapper in wrappers.values()]:
        if recipe.reparameterize is not None:
            raise ValueError("the prefix is made by an MLP; fold(model) first")
        if recipe.at != "kv" or recipe.gated:
            raise ValueError(f'a folder holds keys and values alone, which {recipe} is not; train at="kv" without gate')
    (n, *others) = {wrapper.recipe.length for wrapper in wrappers.values()}
    if others or len(wrappers) < config.n_layers:
        raise ValueError("a folder has a prefix of one length in every layer; leave `layers` of PrefixTuning out")
    ordered = []
    for layer in range(config.n_layers):
        wrapper = wrappers[names.site(f"blocks.{layer}.attention")]
        ordered += [turned(wrapper.key, names, 1), wrapper.value.double()]
    options = {"peft_type": "PREFIX_TUNING", **_sizes(n, config.d_kv, config.d_kv // config.d_head, names)}
    options |= {"encoder_hidden_size": config.d_kv, "prefix_projection": False}
    return Written(options, {NAME: torch.stack(ordered, dim=1).flatten(1)}, {})


def found_prefix(options: Options, tensors: dict[str, Tensor], names: Names, record: dict[str, Any]) -> Found:
    """The recipe and the tensors that a folder holds: keys and values, however they were made in training.

    Raises:
        ValueError: learned positions; an option, a name or a shape that does not fit.
    """
    _require_rotary(names)
    # An MLP is folded away in the file.
    options.unused({"encoder_hidden_size": int, "prefix_projection": bool, "init_weights": str})
    d, n_layers = names.config.d_kv, names.config.n_layers
    n = _length(options, tensors, names, d, d // names.config.d_head, 2 * n_layers)
    parts = tensors[NAME].view(n, n_layers, 2, d).unbind(2)
    ours = {}
    for layer, (key, value) in enumerate(zip(*(part.unbind(1) for part in parts), strict=True)):
        site = names.site(f"blocks.{layer}.attention")
        ours |= {f"{site}.key": turned(key, names, -1), f"{site}.value": value}
    return Found([PrefixTuning(length=n, init="normal")], ours)


def written_prompt(wrappers: dict[str, PromptEmbedding], names: Names) -> Written:
    """The folder's contents for a prompt; ValueError for a model of masked words, a task that theirs lacks."""
    if names.config.lm_head == "bert" and not names.root:
        raise ValueError("Hugging Face's peft leaves a prompt out where a model fills in masked words; choose LoRA")
    (wrapper,) = wrappers.values()
    n, d = wrapper.prompt.shape
    options = {"peft_type": "PROMPT_TUNING", **_sizes(n, d, names.config.n_heads, names)}
    return Written(options | {"prompt_tuning_init": "RANDOM"}, {NAME: wrapper.prompt}, {})


def found_prompt(options: Options, tensors: dict[str, Tensor], names: Names, record: dict[str, Any]) -> Found:
    """The recipe and the tensor that a folder holds.

    Raises:
        ValueError: an option, a name or a shape that does not fit.
    """
    options.unused(dict.fromkeys(("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"), str))
    options.unused({"tokenizer_kwargs": dict})
    n = _length(options, tensors, names, names.config.d_model, names.config.n_heads)
    return Found([PromptTuning(length=n, init="normal")], {names.site("embedding.prompt"): tensors[NAME]})


def turned(key: Float[Tensor, "n d_kv"], names: Names, direction: int) -> Float[Tensor, "n d_kv"]:
    """R(± n) k of n keys: from ours to theirs (1) or back (-1). In float64, so that the way back is exact."""
    n, config = len(key), names.config
    exponents = torch.arange(0, config.d_head, 2, dtype=torch.float64, device=key.device) / config.d_head
    angles = (direction * n * config.rope_theta**-exponents).view(1, 1, 1, -1)
    heads = key.detach().double().view(n, -1, 1, config.d_head)  # every key is turned by the same n
    return rotated(heads, angles.cos(), angles.sin()).flatten(1)


def _sizes(n: int, width: int, n_heads: int, names: Names) -> dict[str, Any]:
    return {
        "num_virtual_tokens": n,
        "token_dim": width,
        "num_attention_heads": n_heads,
        "num_layers": names.config.n_layers,
        "num_transformer_submodules": 1,
    }


def _length(
    options: Options, tensors: dict[str, Tensor], names: Names, width: int, n_heads: int, pieces: int = 1
) -> int:
    """How many positions the folder holds, once its one tensor is known to be so many pieces of that width."""
    n = options.count("num_virtual_tokens")
    for option, value in _sizes(n, width, n_heads, names).items():
        options.only(option, value)
    options.finish()
    if options.get("task_type") is None:
        raise ValueError("without a task_type Hugging Face's peft leaves the prompt out; add the one of its training")
    if tensors.keys() != {NAME}:
        strange = min(tensors.keys() ^ {NAME})
        raise ValueError(f"the folder must hold {NAME} alone, and {strange!r} is one too many or is missing")
    check_shape(NAME, tensors[NAME], n, pieces * width)
    return n


def _require_rotary(names: Names) -> None:
    if names.config.position != "rotary":
        raise ValueError(
            "behind a prefix, Hugging Face's text stands at positions n, n + 1, …, ours at 0, 1, …, and with learned "
            "positions no keys make up for that; exchange a prompt or LoRA, or a prefix of the Llama family"
        )

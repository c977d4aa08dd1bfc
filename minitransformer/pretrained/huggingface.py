"""What the readers of Hugging Face's checkpoints share: check the config, then account for every tensor.

A checkpoint that fits only in part still runs and gives wrong numbers, so every tensor must either find its place
or be known to be of no use, and every option that we do not compute must have the value that makes no difference.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minitransformer.config import TransformerConfig
from minitransformer.pretrained.state_dict import Form
from minitransformer.transformer import Transformer

# Hugging Face's name -> ours. The tanh forms differ in how they are computed, not in what.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
SIZES = {  # ours -> as BERT and the Llama family name them
    "vocab_size": "vocab_size",
    "max_len": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
}
EMBEDDINGS = ("wte.weight", "embeddings.word_embeddings.weight", "embed_tokens.weight")
NOT_QUANTISED = {"quantization_config": False}  # as is an absent one
OTHER_ARITHMETIC = re.compile(  # what an option is about that changes what is computed, whoever invented it
    r"scale|scaling|multiplier|softcap|clip_|attention_dropout|rotary|rope|alibi|window|attention_chunk|bidirectional|"
    r"expert|parallel_(attn|residual)|qk_|cross_attention|encoder_decoder|pruned_heads"
)
FACTOR = re.compile("scale|scaling|multiplier|factor")  # 1 leaves all as it is
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


@dataclass(frozen=True)
class Writer:
    """An architecture's reader the other way round."""

    form: Form
    classes: Mapping[str, str]  # our lm_head -> theirs with such a head
    their_config: Callable[[TransformerConfig], dict[str, Any]]  # what config.json says of such a model
    our_config: Callable[[Mapping[str, Any], str], TransformerConfig]  # what the reader makes of it and of our lm_head
    names: Callable[[int], dict[str, str]]  # for so many layers: our module -> theirs
    joined: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # by their names: as their file lays tensors out


def read_sizes(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """The sizes of a config by our names; `names`: ours -> theirs."""
    return {ours: config[theirs] for ours, theirs in names.items()}


def written_sizes(config: TransformerConfig, names: Mapping[str, str]) -> dict[str, int]:
    """The sizes of our config by their names; `names`: ours -> theirs."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def written_activation(activation: str) -> str:
    """Hugging Face's first name for our activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def check_options(
    config: Mapping[str, Any],
    form: Form,
    sizes: Iterable[str],
    supported: dict,
    read: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> None:
    """Raise ValueError unless `config` is of this architecture, states every size, and has only supported options.

    Args:
        config: the contents of config.json, as a dict.
        form: of the architecture.
        sizes: the options that must be there, each a whole number from 1.
        supported: option -> the one value we compute, which is also the value where the option is left out.
        read: other options that the reader itself reads.
        optional: sizes that may be left out or null.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config is a dict, the contents of config.json, got {type(config).__name__}; read the file by json.loads, "
            f"or call to_dict() on a config of Hugging Face's"
        )
    if not form.is_of(config):
        kind, classes = config.get("model_type"), config.get("architectures")
        raise ValueError(
            f"config has model_type={kind!r} and architectures={classes!r}, but only {form.model_type!r} is supported; "
            f"choose such a checkpoint"
        )
    absent = [name for name in sizes if name not in config]
    if absent:
        raise ValueError(f"config lacks {', '.join(absent)}; pass the whole config.json of the checkpoint as a dict")
    for name in (*sizes, *(name for name in optional if config.get(name) is not None)):
        if type(config[name]) is not int or not 1 <= config[name] < 2**30:
            raise ValueError(f"config has {name}={config[name]!r}, which is no size; pass the checkpoint's config.json")
    for name in FLAGS:
        if type(config.get(name, False)) is not bool:
            raise ValueError(f"config has {name}={config[name]!r}, where true or false is needed; write which it is")
    for name, value in (supported | NOT_QUANTISED).items():
        given = config.get(name, value)
        if given != value and not (value is False and not given):
            raise ValueError(f"config has {name}={given!r}, but only {value!r} is supported; choose such a checkpoint")
    check_arithmetic(config, (*read, *supported))


def check_arithmetic(config: Mapping[str, Any], read: Iterable[str]) -> None:
    """Raise ValueError for an option of other arithmetic, unless it is off: a factor of 1, or nothing."""
    for name, value in config.items():
        is_off = not value or (value == 1 and value is not True and FACTOR.search(name))
        if name not in read and OTHER_ARITHMETIC.search(name) and not is_off:
            raise ValueError(f"config has {name}={value!r}, which is not computed; choose a checkpoint without it")


def check_tied(config: Mapping[str, Any], head: str) -> None:
    """Raise ValueError where the config says that the language-model head that is there has a weight of its own."""
    given = config.get("tie_word_embeddings", True)
    if given is not True:
        raise ValueError(
            f"config has tie_word_embeddings={given!r}, but only True is supported for a language-model head; choose "
            f"such a checkpoint, or leave the head out (leave_out=({head!r},)) if only hidden states are wanted"
        )


def read_activation(name: Any) -> str:
    """Our name of Hugging Face's activation.

    Raises:
        ValueError: we have no such activation.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"the activation {name!r} is not supported; choose a checkpoint with one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def read_number(config: Mapping[str, Any], name: str, default: float) -> float:
    """The option's value, or the default where it is left out.

    Raises:
        ValueError: it is no number.
    """
    value = config.get(name, default)
    if type(value) not in (int, float):
        raise ValueError(f"config has {name}={value!r}, which is no number; pass the checkpoint's config.json")
    return value


def read_dropout(config: Mapping[str, Any], names: tuple[str, ...]) -> float:
    """The one dropout rate of the model, from options that must agree; 0.1 where an option is left out.

    Raises:
        ValueError: the rates differ, or one is no number.
    """
    rates = {name: read_number(config, name, 0.1) for name in names}
    if len(set(rates.values())) > 1:
        listed = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        raise ValueError(
            f"one dropout rate serves the whole model, but config has {listed}; set them to one value (they matter "
            f"in training only)"
        )
    return rates[names[0]]


def filled(
    config: TransformerConfig, tensors: dict[str, Tensor], names: Callable[[int], dict[str, str]], assign: bool = False
) -> Transformer:
    """A model with copies of these tensors, float32, in evaluation mode.

    Args:
        config: of the model.
        tensors: by Hugging Face's names.
        names: gives, for so many layers, our module -> theirs; the last part of a name (weight, bias) is the same.
        assign: the tensors themselves, as they are, instead of copies: no memory but theirs is taken.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape.
    """
    if config.n_layers > len(tensors):
        raise ValueError(
            f"config says {config.n_layers} layers, but the state dict has {len(tensors)} tensors; config and state "
            f"dict must be of one checkpoint"
        )
    their_modules = names(config.n_layers)
    with torch.device("meta"), NothingDrawn():  # no memory is taken before the shapes are known to fit
        model = Transformer(config).eval()
    places, theirs = model.state_dict(), {}
    for name in places:
        module, _, last = name.rpartition(".")
        theirs[name] = f"{their_modules[module]}.{last}"
    check_names(set(theirs.values()), set(tensors))
    for name, place in places.items():
        check_shape(theirs[name], tensors[theirs[name]], place.shape)
    weights = {name: tensors[own] for name, own in theirs.items()}
    if not assign:
        weights = {name: torch.empty(weight.shape).copy_(weight) for name, weight in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model


class NothingDrawn(TorchFunctionMode):
    """Modules are made without first weights: drawing them on meta would import PyTorch's compiler, 1.5 s and 70 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def check_names(expected: set[str], given: set[str]) -> None:
    """Raise ValueError unless every expected tensor is given, and no other."""
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    if missing:
        beside = f", and has in their place or beside them {_listed(unexpected)}" if unexpected else ""
        raise ValueError(
            f"the state dict lacks {_listed(missing)}{beside}; config and state dict must be of one checkpoint"
        )
    if unexpected:
        parts = {name.partition(".")[0] for name in expected}
        heads = tuple(dict.fromkeys(f"{part}." for name in unexpected if (part := name.partition(".")[0]) not in parts))
        raise ValueError(
            f"the state dict has unexpected tensors: {_listed(unexpected)}; drop them if they belong to a head that "
            f"is not wanted{f' (leave_out={heads})' if heads else ''}, and check that config and state dict are of one "
            f"checkpoint"
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has the shape that the config implies."""
    given, expected = tuple(tensor.shape), tuple(expected)
    if given == expected:
        return
    cure = "config and state dict must be of one checkpoint"
    if len(expected) == 2 and given == expected[::-1]:
        cure = (
            "it is the transpose; bring the weight of every linear layer into Hugging Face's order, the square ones "
            "as well, whose shapes do not tell"
        )
    elif name in EMBEDDINGS and given[1:] == expected[1:] and given > expected:
        cure = f"if the vocabulary is padded, say so by vocab_size={given[0]} in the config"
    raise ValueError(f"{name!r} has shape {given}, but config says {expected}; {cure}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

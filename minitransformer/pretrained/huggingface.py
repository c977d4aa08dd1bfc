"""What the readers of Hugging Face's checkpoints share: check the config, then account for every tensor.

A checkpoint that fits only in part still runs and gives wrong numbers, so every tensor must either find its place
or be known to be of no use, and every option that we do not compute must have the value that makes no difference.
"""

import torch
from torch import Tensor, nn

# Hugging Face's name -> ours. The tanh forms differ in how they are computed, not in what.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def check_options(config: dict, sizes: tuple[str, ...], supported: dict) -> None:
    """Raise ValueError unless `config` states every size, and no option has an unsupported value.

    Args:
        config: the contents of config.json, as a dict.
        sizes: the options that must be there.
        supported: option -> the one value we compute, which is also the value where the option is left out.
    """
    absent = [name for name in sizes if name not in config]
    if absent:
        raise ValueError(f"config lacks {', '.join(absent)}; pass the whole config.json of the checkpoint as a dict")
    for name, value in supported.items():
        given = config.get(name, value)
        if given != value and not (value is False and not given):
            raise ValueError(f"config has {name}={given!r}, but only {value!r} is supported; choose such a checkpoint")


def read_activation(name: str) -> str:
    """Our name of Hugging Face's activation.

    Raises:
        ValueError: we have no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"the activation {name!r} is not supported; choose a checkpoint with one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def read_dropout(config: dict, names: tuple[str, ...]) -> float:
    """The one dropout rate of the model, from options that must agree; 0.1 where an option is left out.

    Raises:
        ValueError: the rates differ.
    """
    rates = {name: config.get(name, 0.1) for name in names}
    if len(set(rates.values())) > 1:
        listed = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        raise ValueError(
            f"one dropout rate serves the whole model, but config has {listed}; set them to one value (they matter "
            f"in training only)"
        )
    return rates[names[0]]


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors with `prefix` cut off the names that have it.

    Raises:
        ValueError: a tensor is there twice, with the prefix and without.
    """
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        twice = next(name for name in tensors if prefix + name in tensors)
        raise ValueError(f"{twice!r} is there with and without {prefix!r}; pass the state dict of one model")
    return bare


def without_copies(tensors: dict[str, Tensor], copies: dict[str, str]) -> dict[str, Tensor]:
    """The tensors without those that only repeat another one (`copies`: copy -> original).

    Raises:
        ValueError: a copy differs from its original, so the checkpoint is not tied.
    """
    for copy, original in copies.items():
        if copy in tensors and original in tensors and not torch.equal(tensors[copy], tensors[original]):
            raise ValueError(
                f"{copy!r} differs from {original!r}, but our language-model head is tied to the embedding; choose a "
                f"tied checkpoint, or drop the head's tensors if only hidden states are wanted"
            )
    return {name: tensor for name, tensor in tensors.items() if not (name in copies and copies[name] in tensors)}


def fill(model: nn.Module, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """Copy `tensors` into `model`, each into its place.

    Args:
        model: whose weights are overwritten, unless an error is raised: then it is as it was.
        tensors: by Hugging Face's names.
        names: our module -> theirs; the last part of a name (weight, bias) is the same in both.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape.
    """
    places = {}
    for name, place in model.state_dict().items():
        module, _, last = name.rpartition(".")
        places[f"{names[module]}.{last}"] = place
    missing, unexpected = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing:
        raise ValueError(f"the state dict lacks {_listed(missing)}; config and state dict must be of one checkpoint")
    if unexpected:
        raise ValueError(
            f"the state dict has unexpected tensors: {_listed(unexpected)}; drop them if they belong to a head that "
            f"is not wanted, and check that config and state dict are of one checkpoint"
        )
    for name, place in places.items():
        check_shape(name, tensors[name], place.shape)
    for name, place in places.items():  # state_dict() shares its memory with the model
        place.copy_(tensors[name])


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has the shape that the config implies."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name!r} has shape {tuple(tensor.shape)}, but config says {tuple(expected)}; config and state dict must "
            f"be of one checkpoint"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

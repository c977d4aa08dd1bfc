"""What a folder says, and what is to be said in one; and checks that all methods share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft.method import Method

FRONT = "base_model.model."  # of the names of tensors at modules of the frozen model
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Found(NamedTuple):
    """What a folder says: the recipes to attach, and their tensors by our names."""

    recipes: list[Method]
    tensors: dict[str, Tensor]


class Written(NamedTuple):
    """What a folder is to say: the options of the method, and the tensors by their names."""

    options: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any]  # what their names have no room for, for our reader alone


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for a tensor that is not of floating-point numbers, all finite."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is of {tensor.dtype}, where float16, bfloat16, float32 or float64 is needed")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds a NaN or an infinity; take a folder from before the training went wrong")


def check_shape(name: str, tensor: Tensor, *expected: int) -> None:
    """Raise ValueError unless the tensor has that shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but config and model say {list(expected)}; load it into the model "
            f"that it was trained on"
        )

"""Every test runs with shapes checked: the check itself, on functions of its own and on one of the packages."""

from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from reference.checked_shapes import checked
from torch import Tensor

from minitransformer import TransformerConfig


@checked
def projected(
    x: Float[Tensor, "rows d"], weight: Float[Tensor, "out d"], wrong: bool = False
) -> Float[Tensor, "rows out"]:
    return x if wrong else inner(x) @ weight.T


@checked
def inner(x: Float[Tensor, "d rows"]) -> Float[Tensor, "d rows"]:
    """Names of axes belong to one call: here they are exchanged."""
    return x


@checked
@dataclass
class Pair:
    left: Float[Tensor, " d"]
    right: Float[Tensor, " d"]


@checked
def length(word: str) -> int:
    return word if word == "not a number" else len(word)


def test_what_fits_passes():
    assert projected(torch.zeros(2, 3), torch.zeros(4, 3)).shape == (2, 4)
    assert Pair(torch.zeros(2), torch.zeros(2)).left.shape == (2,) and length("four") == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: projected(torch.zeros(2, 3), torch.zeros(4, 5)),  # the same axis twice
        lambda: projected(torch.zeros(2, 3), torch.zeros(4, 3), wrong=True),  # the result
        lambda: projected(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3)),
        lambda: Pair(torch.zeros(2), torch.zeros(3)),
        lambda: length(4),
        lambda: length("not a number"),
        lambda: TransformerConfig("23", 12, 16, 2, 2, 24),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()


def test_it_can_be_switched_off(unchecked):
    assert projected(torch.zeros(2, 3), torch.zeros(4, 3), wrong=True).shape == (2, 3)

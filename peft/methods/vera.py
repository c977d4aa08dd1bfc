"""VeRA: one pair of random matrices for all layers, and two trained vectors in each.

Source: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", section 3, equation 2.

    y = W0 x + b0 + b ⊙ B (d ⊙ A x)                      ΔW = diag(b) B diag(d) A

A and B are drawn once, shared by all layers, and never trained: the vectors d and b choose which of the random
directions a layer reads, and how much of each it writes. So the rank may be high: one more costs one parameter a layer.

Shapes: x [..., d_in], A [r, d_in], B [d_out, r], d [r], b [d_out]. Where layers differ in shape, A and B have the
largest sides, and each layer takes the first d_in columns and d_out rows. Trained: r + d_out parameters a layer.
Start: A and B from Kaiming's uniform distribution, d = 0.1, b = 0, so that the update is zero (sections 3.2 and 4.1).

Differs from the paper: A and B are kept in the file, once, where the paper keeps the seed that they can be drawn from.
Being one parameter of many layers, they cannot be sharded block by block (FSDP's `fully_shard`): shard the whole model.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from peft.functional import FactorA, FactorB, Inputs, Outputs, OutputVector, Weight, without_autocast
from peft.method import parameter_like, uniform
from peft.methods.linear import LinearMethod, MergeableLinear
from peft.methods.options import Count, Factor


def vera_update(x: Inputs, A: FactorA, B: FactorB, d: Float[Tensor, " r"], b: OutputVector) -> Outputs:
    """b ⊙ B (d ⊙ A x): what VeRA adds to a linear layer's output. Kopiczko et al. 2024, equation 2."""
    return b * F.linear(d * F.linear(x, A), B)


def vera_weight(A: FactorA, B: FactorB, d: Float[Tensor, " r"], b: OutputVector) -> Weight:
    """ΔW = diag(b) B diag(d) A: the same update as a change of the weight."""
    with without_autocast(A):
        return b[:, None] * ((B * d) @ A)


@dataclass(frozen=True)
class VeRA(LinearMethod):
    """Recipe: two trained vectors for each linear layer that `targets` names.

    Args:
        rank: r, how many random directions the layers share.
        initial_d: the start of every number in d.
        targets, layers: as in `LinearMethod`.
    """

    rank: Count = 128
    initial_d: Factor = 0.1  # with b = 0 as well, nothing could be learned

    def wrap(self, name: str, module: nn.Linear, model: nn.Module, generator: torch.Generator) -> "VeRALinear":
        """A `VeRALinear` with an A and a B that no other layer shares."""
        return self.wrappers({name: module}, model, generator)[name]

    def wrappers(
        self, modules: dict[str, nn.Linear], model: nn.Module, generator: torch.Generator
    ) -> dict[str, "VeRALinear"]:
        """A `VeRALinear` round each layer; all of them hold the same A and B."""
        layers, r = [*modules.values()], self.rank
        d_in, d_out = max(layer.in_features for layer in layers), max(layer.out_features for layer in layers)
        A = parameter_like(uniform((r, d_in), math.sqrt(6 / d_in), generator), layers[0], requires_grad=False)
        B = parameter_like(uniform((d_out, r), math.sqrt(6 / r), generator), layers[0], requires_grad=False)
        return {name: VeRALinear(module, self, A, B) for name, module in modules.items()}

    def expected_parameters(self, config: TransformerConfig) -> int:
        """layers * r + the sum of their d_out; ValueError as in `attach`."""
        return sum(self.rank + d_out for _, d_out in self.targeted_shapes(config))


class VeRALinear(MergeableLinear):
    """y = base(x) + b ⊙ B (d ⊙ A x), with explicit d [r] and b [d_out]; A and B are shared and frozen."""

    position_wise = True

    def __init__(self, base: nn.Linear, recipe: VeRA, A: nn.Parameter, B: nn.Parameter):
        super().__init__(base)
        self.A, self.B = A, B
        self.d = parameter_like(torch.full((recipe.rank,), float(recipe.initial_d)), base)
        self.b = parameter_like(torch.zeros(base.out_features), base)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [r, d_in], B [d_out, r], d and b of this layer."""
        return self.A[:, : self.base.in_features], self.B[: self.base.out_features], self.d, self.b

    def adapted(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """W0 x + b0 + b ⊙ B (d ⊙ A x). Kopiczko et al. 2024, equation 2."""
        y = self.base(x)
        return y + vera_update(x.to(self.A.dtype), *self.factors()).to(y.dtype)

    def changed_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W0 + ΔW, in the precision of the vectors."""
        return self.base.weight.to(self.A.dtype) + vera_weight(*self.factors())

    def frozen_tensors(self) -> set[str]:
        """The shared matrices."""
        return {"A", "B"}

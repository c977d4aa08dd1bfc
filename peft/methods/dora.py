"""DoRA: LoRA for the direction of each row of a weight, and a trained length for it.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5.

    W = m (W0 + ΔW) / ||W0 + ΔW||                    ΔW = (alpha / r) B A,  row by row

Shapes: m [d_out], at the start the lengths of the rows of W0; A [r, d_in] and B [d_out, r] as in LoRA. Trained: LoRA's
parameters, and d_out for each linear layer.

Differs from the paper: it speaks of the columns of W, with `y = x W`; in `[out, in]` they are rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from peft.functional import dora_weight, lora_update, lora_weight, row_norms
from peft.method import parameter_like
from peft.methods.lora import LoRA, LoRALinear


@dataclass(frozen=True)
class DoRA(LoRA):
    """Recipe: what `LoRA` changes, with a trained length for each row on top. The options are those of `LoRA`.

    Raises:
        ValueError: what `LoRA` refuses; on attaching, a frozen weight with a row of zeros.
    """

    def wrap(self, name: str, module: nn.Linear, model: nn.Module, generator: torch.Generator) -> "DoRALinear":
        self.check_rank(name, module.in_features, module.out_features)
        if bool((row_norms(module.weight.detach()) == 0).any()):
            raise ValueError(f"{name} has a row of zeros, which has no direction; DoRA cannot start there, LoRA can")
        return DoRALinear(module, self, generator)

    def expected_parameters(self, config: TransformerConfig) -> int:
        """LoRA's, and d_out for each linear layer."""
        return super().expected_parameters(config) + sum(d_out for _, d_out in self.targeted_shapes(config))


class DoRALinear(LoRALinear):
    """y = m / ||W0 + ΔW|| (W0 x + (alpha / r) B A dropout(x)) + b, with explicit A, B and m = `magnitude` [d_out]."""

    position_wise = True

    def __init__(self, base: nn.Linear, recipe: DoRA, generator: torch.Generator):
        super().__init__(base, recipe, generator)
        self.magnitude = parameter_like(row_norms(base.weight.detach().to(self.A.dtype)), base)

    def adapted(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """m / ||W0 + ΔW|| (W0 + ΔW) x + b. Liu et al. 2024, equation 5."""
        y = self.base(x)
        dropped = F.dropout(x.to(self.A.dtype), self.recipe.dropout, self.training)
        update = lora_update(dropped, self.A, self.B, self.scale)  # ΔW x
        factor = self.magnitude / self.norms()  # [d_out]
        product = y.to(factor.dtype) - (0 if self.base.bias is None else self.base.bias)  # W0 x
        # factor * (product + update) + b, written as a change of y: exactly y at the start, where factor is 1.
        return y + ((factor - 1) * product + factor * update).to(y.dtype)

    def changed_weight(self) -> Float[Tensor, "d_out d_in"]:
        """m (W0 + ΔW) / ||W0 + ΔW||."""
        W0 = self.base.weight.to(self.A.dtype)
        return dora_weight(W0, self.A, self.B, self.magnitude, self.norms(), self.scale)

    def norms(self) -> Float[Tensor, " d_out"]:
        """The lengths of the rows of W0 + ΔW, taken as constants (section 4.3)."""
        with torch.no_grad():  # at which forward mode does not stop
            return row_norms(self.base.weight.to(self.A.dtype) + lora_weight(self.A, self.B, self.scale)).detach()

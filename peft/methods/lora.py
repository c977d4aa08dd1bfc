"""LoRA: the change of a weight as the product of two thin matrices.

Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3.

    y = W0 x + b + (alpha / r) B A dropout(x)            ΔW = (alpha / r) B A

Why it can work: the change that fine-tuning makes has a low *intrinsic dimension* (Aghajanyan et al. 2021), so a matrix
of rank r << min(d_in, d_out) holds most of it.

Shapes: x [..., d_in], A [r, d_in], B [d_out, r], y [..., d_out]. Trained: r (d_in + d_out) parameters, not d_in d_out.
Variants: a trained length for each row (`dora.py`), two learning rates (`lora_plus.py`), one product (`fast/lora.py`),
W0 in 4 bits ("QLoRA": `minitransformer/quantized.py`).

Differs from the paper: A is drawn from U(-1/sqrt(d_in), 1/sqrt(d_in)), as in the authors' code, where the paper says
Gaussian; and one factor alone may be trained (`train`), see the docstring of `LoRA`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from peft.fast.lora import fast_lora, is_known
from peft.functional import lora_update, lora_weight
from peft.method import parameter_like, uniform
from peft.methods.linear import LinearMethod, MergeableLinear
from peft.methods.options import Count, Factor, Probability, some_of

ALL_LINEARS = ("query", "key", "value", "output", "up", "down")  # a gated FFN has one more: (*ALL_LINEARS, "gate")


@dataclass(frozen=True)
class LoRA(LinearMethod):
    """Recipe: low-rank updates of the linear layers that `targets` names.

    Args:
        rank: r, the width of the bottleneck between A and B.
        alpha: numerator of the scale alpha / r, meant to spare a new learning rate for each rank (section 4.1); only
            roughly so, since with Adam the first update still falls as 1 / sqrt(r).
        dropout: probability with which each number that the update reads is dropped, in training only.
        train: which factors are trained. One of them starts at zero, so that the update does; the other at random.
            ("A", "B"): B = 0, as in the paper. ("B",): B = 0, and A, the r directions to read, stays random (LoRA-FA,
            Zhang et al. 2023). ("A",): A = 0, and B, those to write, stays random (Zhu et al. 2024 compare the two).
        rank_stabilized: divide alpha by sqrt(r): by r, a high rank learns ever more slowly (Kalajdzievski 2023, 3.2).
        targets, layers: as in `LinearMethod`.

    Raises:
        ValueError: on attaching, a rank above min(d_in, d_out).
    """

    rank: Count = 8
    alpha: Factor = 16.0
    dropout: Probability = 0.0
    train: some_of("A", "B") = ("A", "B")
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) if rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def wrap(self, name: str, module: nn.Linear, model: nn.Module, generator: torch.Generator) -> "LoRALinear":
        self.check_rank(name, module.in_features, module.out_features)
        return LoRALinear(module, self, generator)

    def check_rank(self, name: str, d_in: int, d_out: int) -> None:
        """Raise ValueError if B A could not use a rank as high as that."""
        if self.rank > (highest := min(d_in, d_out)):
            raise ValueError(f"rank {self.rank} exceeds min(d_in, d_out) = {highest} of {name}; choose at most that")

    def expected_parameters(self, config: TransformerConfig) -> int:
        """blocks * sum over targets of r d_in (if A is trained) + r d_out (if B is); ValueError as in `attach`."""
        A, B, shapes = "A" in self.train, "B" in self.train, self.targeted_shapes(config)
        self.check_rank("the narrowest target", *min(shapes, key=min))
        return self.rank * sum(A * d_in + B * d_out for d_in, d_out in shapes)


class LoRALinear(MergeableLinear):
    """y = base(x) + (alpha / r) B A dropout(x), with explicit A [r, d_in] and B [d_out, r]."""

    position_wise = True

    def __init__(self, base: nn.Linear, recipe: LoRA, generator: torch.Generator):
        super().__init__(base)
        self.recipe, self.scale = recipe, recipe.scale
        d_in, d_out, r = base.in_features, base.out_features, recipe.rank
        A_learns, B_learns = "A" in recipe.train, "B" in recipe.train
        A = uniform((r, d_in), 1 / math.sqrt(d_in), generator) if B_learns else torch.zeros(r, d_in)
        B = torch.zeros(d_out, r) if B_learns else uniform((d_out, r), 1 / math.sqrt(r), generator)
        self.A, self.B = parameter_like(A, base, A_learns), parameter_like(B, base, B_learns)
        self.many = d_in * d_in * d_out / (d_in + d_out)  # numbers in x from which on B A costs less than two products

    def adapted(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """W0 x + b + (alpha / r) B A dropout(x). Hu et al. 2022, equation 3."""
        if type(self) is LoRALinear and x.numel() >= self.many and is_known(self, x):
            return fast_lora(x, self.base, self.base.bias, self.A, self.B, self.scale)
        y = self.base(x)
        dropped = F.dropout(x.to(self.A.dtype), self.recipe.dropout, self.training)
        return y + lora_update(dropped, self.A, self.B, self.scale).to(y.dtype)

    def changed_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W0 + ΔW, in the precision of the factors."""
        return self.base.weight.to(self.A.dtype) + lora_weight(self.A, self.B, self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}, train={'+'.join(self.recipe.train)}"

    def frozen_tensors(self) -> set[str]:
        """The factor that `train` does not name, if any."""
        return {"A", "B"} - set(self.recipe.train)

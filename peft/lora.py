"""LoRA: the change of a weight as the product of two thin matrices.

Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3.

    y = W0 x + b + (alpha / r) B A dropout(x)            ΔW = (alpha / r) B A

Why it can work: the change that fine-tuning makes has a low *intrinsic dimension* (Aghajanyan et al. 2021), so a matrix
of rank r << min(d_in, d_out) holds most of it.

Shapes: x [..., d_in], A [r, d_in], B [d_out, r], y [..., d_out]. Trained: r (d_in + d_out) numbers per linear map,
instead of d_in d_out.

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
from peft.functional import lora_update
from peft.method import Method, Wrapper, parameter_like, uniform
from peft.sites import find

ALL_LINEARS = ("query", "key", "value", "output", "up", "down")


@dataclass(frozen=True)
class LoRA(Method):
    """Recipe: low-rank updates of the linear maps that `targets` names.

    Args:
        rank: r, the width of the bottleneck between A and B.
        alpha: numerator of the scale alpha / r; with it fixed, the learning rate need not change with the rank.
        dropout: probability with which each input number of the update is dropped, in training only.
        targets: names of linear maps, by whole parts: "query", "feedforward.up", "blocks.0.attention.query".
        train: which factors are trained. The update must be zero at the start, so one factor starts at zero, and it
            must be able to leave zero, so that factor has to be a trained one, facing random numbers:
            ("A", "B"): A random, B = 0, as in the paper. ("B",): A random and frozen, B = 0 (LoRA-FA, Zhang et al.
            2023): A picks r fixed directions of the input, training decides what to write for each. ("A",): A = 0,
            B random and frozen: training decides what to read, the r output directions are fixed (Zhu et al. 2024
            compare the two).

    Raises:
        ValueError: a rank below 1, an alpha of 0, a dropout outside [0, 1), or a `train` that names no factor or an
            unknown one.
    """

    rank: int = 8
    alpha: float | int = 16.0
    dropout: float | int = 0.0
    targets: tuple[str, ...] = ("query", "value")
    train: tuple[str, ...] = ("A", "B")

    def __post_init__(self):
        for name in ("targets", "train"):
            if isinstance(getattr(self, name), str):
                raise ValueError('targets and train are tuples of names, such as ("query", "value") and ("B",)')
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list would not equal what a file gives back
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")
        if self.alpha == 0 or not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number other than 0, got {self.alpha}: nothing could be learned")
        if not self.train or not set(self.train) <= {"A", "B"}:
            raise ValueError(f'train={self.train!r} must name "A", "B" or both')

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """The linear maps that the targets name."""
        linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        return find(self.targets, linears, "linear map")

    def wrap(self, name: str, module: nn.Linear, model: nn.Module, generator: torch.Generator) -> "LoRALinear":
        """A `LoRALinear` round the map."""
        if self.rank > min(module.in_features, module.out_features):
            raise ValueError(
                f"rank {self.rank} exceeds min(d_in, d_out) = {min(module.in_features, module.out_features)} of "
                f"{name}: the update could not use it; choose a rank of at most that"
            )
        return LoRALinear(module, self, generator)

    def expected_parameters(self, config: TransformerConfig) -> int:
        """n_layers * sum over targets of r d_in (if A is trained) + r d_out (if B is).

        Raises:
            ValueError: a target matches no linear map of a Transformer of that shape.
        """
        d, d_ff = config.d_model, config.d_ff
        shapes = {f"attention.{name}": (d, d) for name in ("query", "key", "value", "output")}  # (d_in, d_out)
        shapes |= {"feedforward.up": (d, d_ff), "feedforward.down": (d_ff, d)}
        everywhere = {f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in shapes.items()}
        if config.lm_head == "bert":
            everywhere["head.dense"] = (d, d)
        total = 0
        for name in find(self.targets, everywhere, "linear map"):
            d_in, d_out = everywhere[name]
            total += self.rank * (("A" in self.train) * d_in + ("B" in self.train) * d_out)
        return total


class LoRALinear(Wrapper):
    """y = base(x) + (alpha / r) B A dropout(x), with explicit A [r, d_in] and B [d_out, r]."""

    def __init__(self, base: nn.Linear, recipe: LoRA, generator: torch.Generator):
        super().__init__(base)
        self.recipe = recipe
        d_in, d_out, r = base.in_features, base.out_features, recipe.rank
        A, B = torch.zeros(r, d_in), torch.zeros(d_out, r)
        if "B" in recipe.train:
            A = uniform((r, d_in), 1 / math.sqrt(d_in), generator)
        else:
            B = uniform((d_out, r), 1 / math.sqrt(r), generator)
        self.A = parameter_like(A, base, requires_grad="A" in recipe.train)
        self.B = parameter_like(B, base, requires_grad="B" in recipe.train)
        self.frozen_weight: Tensor | None = None  # W0, kept aside while the update is merged into base.weight

    def extra_repr(self) -> str:
        A, B = list(self.A.shape), list(self.B.shape)
        return f"A={A}, B={B}, scale={self.recipe.scale:g}, train={'+'.join(self.recipe.train)}" + (
            ", merged" if self.merged else ""
        )

    def frozen_tensors(self) -> set[str]:
        """The factor that `train` does not name, if any."""
        return {"A", "B"} - set(self.recipe.train)

    @property
    def merged(self) -> bool:
        """Whether base.weight holds W0 + ΔW at present (see `peft.merge`)."""
        return self.frozen_weight is not None

    def write(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        """Put W0 + ΔW into base.weight and keep W0."""
        self.frozen_weight = self.base.weight.detach().clone()
        with torch.no_grad():
            self.base.weight.copy_(weight)

    def release(self) -> None:
        """Put W0 back, bit for bit."""
        if self.merged:
            with torch.no_grad():
                self.base.weight.copy_(self.frozen_weight)
            self.frozen_weight = None

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Hu et al. 2022, equation 3."""
        if self.merged:
            return self.base(x) if self.enabled else F.linear(x, self.frozen_weight, self.base.bias)
        if not self.enabled:
            return self.base(x)
        dropped = F.dropout(x.to(self.A.dtype), self.recipe.dropout, self.training)
        y = self.base(x)
        return y + lora_update(dropped, self.A, self.B, self.recipe.scale).to(y.dtype)

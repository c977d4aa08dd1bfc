"""LoRA: the change of a weight as the product of two thin matrices.

Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3.

    y = W0 x + b + (alpha / r) B A dropout(x)            ΔW = (alpha / r) B A

Why it can work: the change that fine-tuning makes has a low *intrinsic dimension* (Aghajanyan et al. 2021), so a matrix
of rank r << min(d_in, d_out) holds most of it.

Shapes: x [..., d_in], A [r, d_in], B [d_out, r], y [..., d_out]. Trained: r (d_in + d_out) numbers per linear map,
instead of d_in d_out.

Variants in this file: the rank-stabilised scale alpha / sqrt(r) (`rank_stabilized`; Kalajdzievski 2023), DoRA (`DoRA`;
Liu et al. 2024), and two learning rates (`lora_plus_groups`; Hayou et al. 2024).

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
from peft.functional import dora_weight, lora_update, lora_weight, row_norms
from peft.method import LayerwiseMethod, Wrapper, parameter_like, uniform
from peft.sites import find, in_layers

ALL_LINEARS = ("query", "key", "value", "output", "up", "down")


@dataclass(frozen=True)
class LoRA(LayerwiseMethod):
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
        rank_stabilized: divide alpha by sqrt(r) instead of r (Kalajdzievski 2023, section 3.2): with r the update of a
            high rank learns ever more slowly.
        layers: the numbers of the blocks to enter; None means all.

    Raises:
        ValueError: a rank below 1, an alpha of 0, a dropout outside [0, 1), or a `train` that names no factor or an
            unknown one.
    """

    rank: int = 8
    alpha: float | int = 16.0
    dropout: float | int = 0.0
    targets: tuple[str, ...] = ("query", "value")
    train: tuple[str, ...] = ("A", "B")
    rank_stabilized: bool = False

    def __post_init__(self):
        super().__post_init__()
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
        """alpha / r, or alpha / sqrt(r) if rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """The linear maps that the targets name."""
        linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        inside = in_layers(linears, self.layers)
        return find(self.targets, {name: linears[name] for name in inside}, "linear map")

    def wrap(self, name: str, module: nn.Linear, model: nn.Module, generator: torch.Generator) -> "LoRALinear":
        """A `LoRALinear` round the map."""
        self.check_rank(name, module)
        return LoRALinear(module, self, generator)

    def check_rank(self, name: str, module: nn.Linear) -> None:
        """Raise ValueError if B A could not use a rank as high as that."""
        if self.rank > min(module.in_features, module.out_features):
            raise ValueError(
                f"rank {self.rank} exceeds min(d_in, d_out) = {min(module.in_features, module.out_features)} of "
                f"{name}: the update could not use it; choose a rank of at most that"
            )

    def expected_parameters(self, config: TransformerConfig) -> int:
        """blocks * sum over targets of r d_in (if A is trained) + r d_out (if B is).

        Raises:
            ValueError: a target matches no linear map of a Transformer of that shape.
        """
        return sum(
            self.rank * (("A" in self.train) * d_in + ("B" in self.train) * d_out)
            for d_in, d_out in self.targeted_shapes(config)
        )

    def targeted_shapes(self, config: TransformerConfig) -> list[tuple[int, int]]:
        """(d_in, d_out) of each linear map that the targets name."""
        d, d_ff = config.d_model, config.d_ff
        shapes = {f"attention.{name}": (d, d) for name in ("query", "key", "value", "output")}  # (d_in, d_out)
        shapes |= {"feedforward.up": (d, d_ff), "feedforward.down": (d_ff, d)}
        everywhere = {f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in shapes.items()}
        if config.lm_head == "bert":
            everywhere["head.dense"] = (d, d)
        inside = in_layers(everywhere, self.layers)
        return [everywhere[name] for name in find(self.targets, dict.fromkeys(inside), "linear map")]


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

    def changed_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W0 + ΔW, in the precision of the factors."""
        frozen = self.frozen_weight if self.merged else self.base.weight
        return frozen.to(self.A.dtype) + lora_weight(self.A, self.B, self.recipe.scale)

    def write(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        """Put the changed weight into base.weight and keep W0."""
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
        """What the frozen map gives, changed by the factors; without them where it is merged or disabled."""
        if self.merged and not self.enabled:
            return F.linear(x, self.frozen_weight, self.base.bias)
        y = self.base(x)
        return y if self.merged or not self.enabled else self.changed(y, x)

    def changed(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """y + (alpha / r) B A dropout(x), where y = W0 x + b. Hu et al. 2022, equation 3."""
        return y + self.update(x).to(y.dtype)

    def update(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """(alpha / r) B A dropout(x), in the precision of the factors."""
        dropped = F.dropout(x.to(self.A.dtype), self.recipe.dropout, self.training)
        return lora_update(dropped, self.A, self.B, self.recipe.scale)


@dataclass(frozen=True)
class DoRA(LoRA):
    """Recipe: LoRA for the direction of each row of a weight, and a trained length for it.

        W = m (W0 + ΔW) / ||W0 + ΔW||             m [d_out], at the start the lengths of the rows of W0

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5. The options are those of `LoRA`; d_out
    numbers per linear map come on top.

    Differs from the paper: it speaks of the columns of W, with `y = x W`; in `[out, in]` they are rows.
    """

    def wrap(self, name: str, module: nn.Linear, model: nn.Module, generator: torch.Generator) -> "DoRALinear":
        """A `DoRALinear` round the map."""
        self.check_rank(name, module)
        if bool((row_norms(module.weight.detach()) == 0).any()):
            raise ValueError(f"{name} has a row of zeros, which has no direction; DoRA cannot start there, LoRA can")
        return DoRALinear(module, self, generator)

    def expected_parameters(self, config: TransformerConfig) -> int:
        """LoRA's, and d_out for each linear map."""
        return super().expected_parameters(config) + sum(d_out for _, d_out in self.targeted_shapes(config))


class DoRALinear(LoRALinear):
    """y = m / ||W0 + ΔW|| (W0 x + (alpha / r) B A dropout(x)) + b, with explicit A, B and m = `magnitude` [d_out]."""

    def __init__(self, base: nn.Linear, recipe: DoRA, generator: torch.Generator):
        super().__init__(base, recipe, generator)
        self.magnitude = parameter_like(row_norms(base.weight.detach().to(self.A.dtype)), base)

    def changed_weight(self) -> Float[Tensor, "d_out d_in"]:
        """m (W0 + ΔW) / ||W0 + ΔW||."""
        frozen = self.frozen_weight if self.merged else self.base.weight
        tensors = (frozen.to(self.A.dtype), self.A, self.B, self.magnitude)
        return dora_weight(*tensors, self.norms(), self.recipe.scale)

    @torch.no_grad()  # Liu et al. 2024, section 4.3: the lengths are taken as constants
    def norms(self) -> Float[Tensor, " d_out"]:
        """The lengths of the rows of W0 + ΔW."""
        return row_norms(super().changed_weight())

    def changed(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """The same as with `changed_weight`, but as a change of y, so that it is exactly y while m / ||W|| = 1."""
        factor = self.magnitude / self.norms()  # [d_out]
        product = y.to(factor.dtype) if self.base.bias is None else y.to(factor.dtype) - self.base.bias
        return y + ((factor - 1) * product + factor * self.update(x)).to(y.dtype)


def lora_plus_groups(model: nn.Module, learning_rate: float, ratio: float = 16.0) -> list[dict]:
    """Parameter groups for an optimizer in which every B learns `ratio` times as fast as all else.

    Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4: with one rate for both
    factors, that of A is too large or that of B too small once the model is wide.

        fit(model, data, steps=600, optimizer=torch.optim.AdamW(lora_plus_groups(model, 2e-3), weight_decay=0.0))

    Raises:
        ValueError: the model trains no B, or a rate or a ratio that is not above 0.
    """
    if not learning_rate > 0 or not ratio > 0:
        raise ValueError(f"learning_rate={learning_rate} and ratio={ratio} must be above 0")
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    writers = {id(m.B) for m in model.modules() if isinstance(m, LoRALinear) and m.B.requires_grad}
    if not writers:
        raise ValueError("the model trains no B of a LoRA, so there is nothing to give a rate of its own")
    return [
        {"params": [p for _, p in trainable if id(p) not in writers], "lr": learning_rate},
        {"params": [p for _, p in trainable if id(p) in writers], "lr": learning_rate * ratio},
    ]

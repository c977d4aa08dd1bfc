"""Counting: how many parameters a method trains, measured on a model and predicted in closed form.

The two must agree; a test says so for every method. The closed form needs a shape only, so it also works for models
that fit into no computer of ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from minitransformer.config import TransformerConfig
from minitransformer.quantized_layer import Quantized
from peft.attach import declared
from peft.method import Method
from peft.sites import merged_wrappers, named_tensors, sites_of


@dataclass(frozen=True)
class Row:
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]
    numbers: int  # how many
    trained: bool
    declared: bool  # belongs to an attached method


@dataclass(frozen=True, repr=False)
class ParameterTable:
    """Every tensor of a model; prints as a table of those that a method brought or that are trained."""

    rows: tuple[Row, ...]
    merged: tuple[str, ...] = ()  # names of the weights that are merged with an update at present

    @property
    def trained(self) -> int:
        """Parameters that require a gradient."""
        return sum(row.numbers for row in self.rows if row.trained)

    @property
    def base(self) -> int:
        """Parameters of the model itself, without the methods'."""
        return sum(row.numbers for row in self.rows if not row.declared)

    @property
    def share(self) -> float:
        """Trained parameters in proportion to those of the base model."""
        return self.trained / self.base if self.base else float("inf")

    def __repr__(self) -> str:
        frozen = [row.numbers for row in self.rows if not (row.trained or row.declared)]
        shown = [row for row in self.rows if row.trained or row.declared]
        cells = [(r.name, str([*r.shape]), f"{r.numbers:,}", "trained" if r.trained else "frozen") for r in shown]
        cells += [(f"({len(frozen)} frozen tensors)", "", f"{sum(frozen):,}", "frozen")] if frozen else []
        lines = in_columns(cells, "<<><")
        lines.append(f"trained: {self.trained:,} of {self.base:,} in the base model = {self.share:.2%}")
        if self.merged:
            more = f" and {len(self.merged) - 1} more" if len(self.merged) > 1 else ""
            lines.append(f"merged at present: {self.merged[0]}{more}")
        return "\n".join(lines)


def in_columns(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """A line for each row, with the cells of a column below each other: to its left side, "<", or its right, ">"."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{cell:{side}{n}}" for cell, side, n in zip(row, sides, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


def parameter_table(model: nn.Module) -> ParameterTable:
    """Every tensor of the model: name, shape, how many parameters, trained or frozen. A quantised weight is one tensor,
    and counts as the parameters it stands for, not as its bytes."""
    belonging, tensors, quantised = declared(model), named_tensors(model), []
    for site, (module, *_) in sites_of(model).items():
        if isinstance(module, Quantized):
            quantised.append(
                Row(f"{site}.weight", module.shape, math.prod(module.shape), trained=False, declared=False)
            )
            for name in module.names:
                del tensors[f"{site}.{name}"]
    rows = [Row(name, tuple(p.shape), p.numel(), p.requires_grad, name in belonging) for name, p in tensors.items()]
    return ParameterTable((*rows, *quantised), tuple(f"{site}.weight" for site in merged_wrappers(model)))


def expected_parameters(config: TransformerConfig, method: Method) -> int:
    """How many parameters `method` trains in a Transformer of that shape, by the formula of its recipe: no model is
    built. Modules trained whole (`train_also`) come on top."""
    return method.expected_parameters(config)

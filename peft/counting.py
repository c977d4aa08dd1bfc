"""Counting: how many numbers a method trains, measured on a model and predicted in closed form.

The two must agree; a test says so for every method. The closed form needs a shape only, so it also works for models
that fit into no computer of ours.
"""

from dataclasses import dataclass

from torch import nn

from minitransformer.config import TransformerConfig
from peft.attach import declared
from peft.method import Method
from peft.sites import merged_wrappers, named_tensors


@dataclass(frozen=True)
class Row:
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]
    numbers: int  # how many
    trained: bool
    declared: bool  # belongs to an attached method


@dataclass(frozen=True)
class ParameterTable:
    """Every tensor of a model; prints as a table of those that a method brought or that are trained."""

    rows: tuple[Row, ...]
    merged: tuple[str, ...] = ()  # names of the weights that hold an update at present

    @property
    def trained(self) -> int:
        """Numbers that require a gradient."""
        return sum(row.numbers for row in self.rows if row.trained)

    @property
    def base(self) -> int:
        """Numbers of the model itself, without the methods'."""
        return sum(row.numbers for row in self.rows if not row.declared)

    @property
    def share(self) -> float:
        """Trained numbers in proportion to those of the base model."""
        return self.trained / self.base

    def shown(self) -> list[Row]:
        """The rows worth a line: trained or declared, and all others in one."""
        rows = [row for row in self.rows if row.trained or row.declared]
        frozen = [row for row in self.rows if not (row.trained or row.declared)]
        total = sum(row.numbers for row in frozen)
        return [*rows, Row(f"({len(frozen)} frozen tensors)", (), total, False, False)] if frozen else rows

    def __str__(self) -> str:
        rows = [
            (row.name, str(list(row.shape)) if row.shape else "", f"{row.numbers:,}", row.trained)
            for row in self.shown()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {numbers:>{widths[2]}}  {'trained' if trained else 'frozen'}"
            for name, shape, numbers, trained in rows
        ]
        return "\n".join([*lines, *self.summary()])

    def summary(self) -> list[str]:
        """The lines below the table."""
        lines = [f"trained: {self.trained:,} of {self.base:,} in the base model = {self.share:.2%}"]
        if self.merged:
            more = f" and {len(self.merged) - 1} more" if len(self.merged) > 1 else ""
            lines.append(f"merged at present: {self.merged[0]}{more}")
        return lines

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'>{row.name}</td><td>{list(row.shape) if row.shape else ''}</td>"
            f"<td>{row.numbers:,}</td><td>{'trained' if row.trained else 'frozen'}</td></tr>"
            for row in self.shown()
        )
        head = "<tr><th style='text-align:left'>tensor</th><th>shape</th><th>numbers</th><th></th></tr>"
        return f"<table>{head}{cells}</table><p>{'<br>'.join(self.summary())}</p>"


def parameter_table(model: nn.Module) -> ParameterTable:
    """Every tensor of the model: name, shape, how many numbers, trained or frozen."""
    belonging = {id(tensor) for tensor in declared(model).values()}
    rows = tuple(
        Row(name, tuple(p.shape), p.numel(), p.requires_grad, id(p) in belonging)
        for name, p in named_tensors(model).items()
    )
    return ParameterTable(rows, tuple(f"{site}.weight" for site in merged_wrappers(model)))


def expected_parameters(config: TransformerConfig, method: Method) -> int:
    """How many numbers `method` trains in a Transformer of that shape, in closed form: no model is built.

    The formula of each method is in its recipe's `expected_parameters`. Modules trained whole (`train_also`) come on
    top.
    """
    return method.expected_parameters(config)

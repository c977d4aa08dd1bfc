"""Counting: how many parameters a method trains, measured on a model and predicted in closed form.

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

    def shown(self) -> list[Row]:
        """The rows worth a line: trained or declared, and all others in one."""
        rows = [row for row in self.rows if row.trained or row.declared]
        frozen = [row.numbers for row in self.rows if not (row.trained or row.declared)]
        return [*rows, Row(f"({len(frozen)} frozen tensors)", (), sum(frozen), False, False)] if frozen else rows

    def summary(self) -> list[str]:
        """The lines below the table."""
        lines = [f"trained: {self.trained:,} of {self.base:,} in the base model = {self.share:.2%}"]
        more = f" and {len(self.merged) - 1} more" if len(self.merged) > 1 else ""
        return [*lines, f"merged at present: {self.merged[0]}{more}"] if self.merged else lines

    def __str__(self) -> str:
        cells = [(r.name, str([*r.shape]) * bool(r.shape), f"{r.numbers:,}", r.trained) for r in self.shown()]
        name, shape, numbers = (max(len(row[i]) for row in cells) for i in range(3))
        lines = [f"{a:<{name}}  {b:<{shape}}  {c:>{numbers}}  {'trained' if d else 'frozen'}" for a, b, c, d in cells]
        return "\n".join([*lines, *self.summary()])

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"


def parameter_table(model: nn.Module) -> ParameterTable:
    """Every tensor of the model: name, shape, how many parameters, trained or frozen."""
    belonging, named = declared(model), named_tensors(model).items()
    rows = tuple(Row(name, tuple(p.shape), p.numel(), p.requires_grad, name in belonging) for name, p in named)
    return ParameterTable(rows, tuple(f"{site}.weight" for site in merged_wrappers(model)))


def expected_parameters(config: TransformerConfig, method: Method) -> int:
    """How many parameters `method` trains in a Transformer of that shape, in closed form: no model is built.

    The formula of each method is in its recipe's `expected_parameters`. Modules trained whole (`train_also`) come on
    top.
    """
    return method.expected_parameters(config)

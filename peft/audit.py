"""The gradient audit: proof, by running a few steps, of which tensors learn and which stay.

"Everything is frozen but A and B" is easy to write and easy to get wrong: a LayerNorm left trainable, a layer that a
target list missed, a prompt computed once and cached. The audit trains for a few steps, looks at every tensor of the
model, and puts all of them back.

Three steps, not one: where one factor starts at zero, the gradient of the other is exactly zero in the first step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitransformer.modes import modes_restored
from minitransformer.randomness import random_state_restored
from peft.attach import attached, declared
from peft.counting import in_columns
from peft.sites import all_wrappers, block_names, layer_of, named_sites, named_tensors


class AuditError(AssertionError):
    """A tensor that should learn does not, or one that should be frozen is not."""


@dataclass(frozen=True)
class AuditRow:
    """What the audit saw of one tensor."""

    tensor: str
    layer: int | None  # the block it belongs to; None outside of blocks
    requires_grad: bool
    gradient_norm: float | None  # in the last step; None if it never got a gradient
    moved: float  # largest change of any of its numbers


@dataclass(frozen=True, repr=False)
class AuditTable:
    """All rows; prints those that are trained, and a summary of the others."""

    rows: tuple[AuditRow, ...]

    def __repr__(self) -> str:
        cells = [(r.tensor, f"{r.gradient_norm:.2e}", f"{r.moved:.1e}") for r in self.rows if r.requires_grad]
        still = [row for row in self.rows if not row.requires_grad]
        reached, moved = sum(row.gradient_norm is not None for row in still), sum(row.moved > 0 for row in still)
        last = f"{len(still)} other tensors: {reached} got a gradient, {moved} moved"
        return "\n".join([*in_columns([("tensor", "gradient norm", "moved by"), *cells], "<>>"), last])


def gradient_audit(
    model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], steps: int = 3, learning_rate: float = 1e-3
) -> AuditTable:
    """Train for a few steps with AdamW over *all* parameters and report what each tensor did; then undo it.

    Args:
        model: with methods attached, or without (then every trainable tensor is audited, as in full fine-tuning).
        loss_fn: from the model to a scalar loss.
        steps: at least 3, so that factors which start at zero have let the gradient through.
        learning_rate: of the trial steps.

    Raises:
        AuditError: a declared tensor got no gradient or one that is not finite, a frozen one got one or moved, an
            undeclared one is trained, or something is computed once and kept from step to step.
        ValueError: fewer than three steps, a rate of 0 or less, or nothing to train.
    """
    if steps < 3:
        raise ValueError(f"steps={steps}: three are needed, since the gradient of A is exactly 0 while B is 0")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate}: nothing would move; choose a rate above 0")
    parameters = named_tensors(model)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError("the model has nothing to train: no tensor requires a gradient. Attach a method first")
    before = {t: (t.detach().clone(), t.grad) for t in [*parameters.values(), *model.buffers()]}
    buffers = [(module._buffers, {**module._buffers}) for module in model.modules()]
    try:
        with modes_restored(model):
            norms = _trial(model, parameters, loss_fn, steps, learning_rate)
        moved = {name: float((p.detach() - before[p][0]).abs().max()) for name, p in parameters.items()}
        blocks = block_names(named_sites(model))
        rows = [AuditRow(n, layer_of(n, blocks), p.requires_grad, norms[n], moved[n]) for n, p in parameters.items()]
    finally:
        for own, held in buffers:
            own.update(held)
        with torch.no_grad():
            for tensor, (values, gradient) in before.items():
                tensor.copy_(values).grad = gradient
    table = AuditTable(tuple(rows))
    _judge(table, model)
    return table


def _trial(model, parameters, loss_fn, steps, learning_rate) -> dict[str, float | None]:
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    with random_state_restored(*{p.device for p in parameters.values()}):
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)  # in the first step, gradients of the caller's
            with torch.no_grad():
                loss_fn(model)  # what is computed once and kept in an evaluation pass gets no gradient afterwards
            with torch.enable_grad():
                loss = loss_fn(model)
            try:
                if loss.requires_grad:  # else no tensor has a part in the loss: the table will say so of each
                    loss.backward()
            except RuntimeError as error:
                if "backward through the graph a second time" not in str(error):
                    raise
                raise AuditError(
                    "something is computed once and kept from one step to the next, so its gradient is lost; compute "
                    "it afresh in every forward pass"
                ) from error
            optimizer.step()
    return {name: None if p.grad is None else p.grad.norm().item() for name, p in parameters.items()}


def _judge(table: AuditTable, model: nn.Module) -> None:
    wrappers = [(name, w) for name, part in all_wrappers(model).items() for w in part]
    on_purpose = {f"{site}.{name}" for site, wrapper in wrappers for name in wrapper.frozen_tensors()}
    belonging, is_bare, problems = declared(model).keys(), not attached(model), []
    for row in table.rows:
        learns, norm, belongs = row.requires_grad, row.gradient_norm, row.tensor in belonging
        is_reached = norm is not None
        faults = {
            "should learn, but got no gradient": learns and not norm,
            f"has a gradient that is not finite: {norm}": is_reached and not math.isfinite(norm),
            "should learn, but is frozen": belongs and not learns and row.tensor not in on_purpose,
            "is trained, but no attached method declares it": learns and not (belongs or is_bare),
            f"is frozen, but got a gradient or moved by {row.moved:.1e}": not learns and (is_reached or row.moved > 0),
        }
        problems += [f"{row.tensor} {fault}" for fault, found in faults.items() if found]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise AuditError("; ".join(problems[:5]) + more)

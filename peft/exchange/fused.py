"""GPT-2's `c_attn`: one linear layer there, three here, and the low-rank updates of both.

    apart    ΔW_q = s B_q A_q,  ΔW_k = s B_k A_k,  ΔW_v = s B_v A_v             A [r, d], B [d, r] each
    fused    ΔW   = s B A                                                       A [R, d], B [3 d, R]

Apart from fused: B is cut into thirds, and all three have the one A. Fused from apart: where the three have one A, the
B are joined (R = r); otherwise the A are stacked, and B has the three on its diagonal and zeros elsewhere: R is the sum
of the ranks. Both are exact. The second would lead back to all R rows in each part; a record says which are whose.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft.exchange.names import PARTS
from peft.functional import row_norms

Ranges = dict[str, list]  # part -> its first row of A, the row behind its last, its alpha


class Update(NamedTuple):
    """A low-rank update of one linear layer; DoRA's has a length for each row."""

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    alpha: float | int
    magnitude: Float[Tensor, " d_out"] | None = None

    @property
    def rank(self) -> int:
        return len(self.A)


def joined(
    updates: dict[str, Update], linears: dict[str, nn.Linear], stabilized: bool, module: str
) -> tuple[Update, Ranges]:
    """One update of c_attn, and which rows of A belong to which part; empty if all rows do to all three.

    Args:
        updates: of the parts that have one.
        linears: all three parts.
        stabilized: whether alpha is divided by the root of the rank.
        module: its name, for messages.

    Raises:
        ValueError: parts with different scales.
    """
    present = [part for part in PARTS if part in updates]
    first = updates[present[0]]
    shared = all(own.alpha == first.alpha and torch.equal(own.A, first.A) for own in updates.values())
    A = first.A if shared else torch.cat([updates[part].A for part in present])
    alpha = first.alpha if shared else alpha_of(first, len(A), stabilized)
    if not shared and not all(close(alpha_of(own, len(A), stabilized), alpha) for own in updates.values()):
        raise ValueError(f"{module} is one layer, but its parts have different scales; give them one alpha / rank")
    d, ranges, start = len(first.B), {}, 0
    B = first.B.new_zeros(3 * d, len(A))
    for part in present:
        stop, row = start + updates[part].rank, d * PARTS.index(part)
        B[row : row + d, start:stop] = updates[part].B
        ranges[part] = [start, stop, updates[part].alpha]
        start = 0 if shared else stop
    magnitude = None
    if first.magnitude is not None:
        frozen = {part: row_norms(linears[part].weight.to(A.dtype)) for part in PARTS if part not in updates}
        magnitude = torch.cat([frozen[part] if part in frozen else updates[part].magnitude for part in PARTS])
    return Update(A, B, alpha, magnitude), {} if shared and len(present) == 3 else ranges


def apart(update: Update, linears: dict[str, nn.Linear], ranges: Any, stabilized: bool) -> dict[str, Update]:
    """The updates of the parts of c_attn. `ranges` None: all rows of A belong to all three.

    Raises:
        ValueError: ranges that do not fit the tensors.
    """
    if ranges is None:
        ranges = {part: [0, update.rank, update.alpha] for part in PARTS}
    elif not _fit(ranges, update, linears, stabilized):
        raise ValueError(
            "the record of c_attn in the metadata of adapter_model.safetensors does not fit its tensors; save the file "
            "again without metadata"
        )
    found = {}
    for part, (rows, length) in _thirds(update).items():
        if part in ranges:
            start, stop, alpha = ranges[part]
            found[part] = Update(update.A[start:stop], rows[:, start:stop], alpha, length)
    return found


def alpha_of(update: Update, rank: int, stabilized: bool) -> float | int:
    """The alpha that gives another rank the same scale."""
    return update.alpha * (math.sqrt(rank / update.rank) if stabilized else rank / update.rank)


def close(a: float | int, b: float | int) -> bool:
    """Whether two numbers are one but for rounding."""
    return math.isclose(a, b, rel_tol=1e-12)


def _thirds(update: Update) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The rows of B and the lengths of each part."""
    d = len(update.B) // 3
    lengths = [None] * 3 if update.magnitude is None else update.magnitude.split(d)
    return dict(zip(PARTS, zip(update.B.split(d), lengths, strict=True), strict=True))


def _fit(ranges: Any, update: Update, linears: dict[str, nn.Linear], stabilized: bool) -> bool:
    """Whether each part has the scale of the whole, and beside its rows there is nothing."""
    if not isinstance(ranges, dict) or not ranges or ranges.keys() - {*PARTS}:
        return False
    for part, (rows, length) in _thirds(update).items():
        if part in ranges and not _fits(ranges[part], rows, update, stabilized):
            return False
        if part not in ranges:
            norms = None if length is None else row_norms(linears[part].weight.to(length.dtype))
            if bool(rows.any()) or (norms is not None and not torch.allclose(length, norms)):
                return False
    return True


def _fits(own: Any, rows: Tensor, update: Update, stabilized: bool) -> bool:
    if not isinstance(own, list) or len(own) != 3 or [type(n) for n in own[:2]] != [int, int]:
        return False
    start, stop, alpha = own
    if not 0 <= start < stop <= update.rank or type(alpha) not in (int, float) or not abs(alpha) < 2**63:
        return False
    beside = torch.cat([rows[:, :start], rows[:, stop:]], dim=1)
    return close(alpha, alpha_of(update, stop - start, stabilized)) and not bool(beside.any())

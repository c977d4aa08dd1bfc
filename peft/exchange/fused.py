"""GPT-2's `c_attn`: one linear layer there, three here, and the low-rank updates of both.

    apart    ΔW_q = s B_q A_q,  ΔW_k = s B_k A_k,  ΔW_v = s B_v A_v             A [r, d], B [d, r] each
    fused    ΔW   = s B A                                                       A [R, d], B [3 d, R]

Apart from fused: B is cut into thirds, and A is that of all three. Fused from apart: where the three have one A, the B
are joined (R = r); otherwise the A are stacked and B has the three on its diagonal, zeros elsewhere: R is the sum of
the ranks. Both are exact. The second leads back to A of R rows in each part, unless a record says which are whose.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft.exchange.names import PARTS
from peft.functional import row_norms


class Update(NamedTuple):
    """A low-rank update of one linear layer; DoRA's has a length for each row."""

    A: Tensor  # [r, d_in]
    B: Tensor  # [d_out, r]
    alpha: float
    magnitude: Tensor | None = None  # [d_out]

    @property
    def rank(self) -> int:
        return len(self.A)


Ranges = dict[str, list]  # part -> first row of A, the row behind the last, alpha


def joined(updates: dict[str, Update], weights: dict[str, Tensor], stabilized: bool) -> tuple[Update, Ranges]:
    """One update of c_attn, and which rows of A belong to which part; empty if all rows to all three.

    Args:
        updates: of the parts that have one, which all have the same scale.
        weights: the frozen weights [d, d] of all three parts.
        stabilized: whether alpha is divided by the root of the rank.
    """
    present = [part for part in PARTS if part in updates]
    first = updates[present[0]]
    shared = all(
        u.alpha == first.alpha and u.A.shape == first.A.shape and torch.equal(u.A, first.A) for u in updates.values()
    )
    A = first.A if shared else torch.cat([updates[part].A for part in present])
    d, ranges, start = len(first.B), {}, 0
    B = first.B.new_zeros(3 * d, len(A))
    for part in present:
        stop, row = start + updates[part].rank, d * PARTS.index(part)
        B[row : row + d, start:stop] = updates[part].B
        ranges[part] = [start, stop, updates[part].alpha]
        start = 0 if shared else stop
    ratio = len(A) / first.rank
    alpha = first.alpha if shared else first.alpha * (math.sqrt(ratio) if stabilized else ratio)
    magnitude = None
    if first.magnitude is not None:
        lengths = [updates[p].magnitude if p in updates else row_norms(weights[p].to(A.dtype)) for p in PARTS]
        magnitude = torch.cat(lengths)
    return Update(A, B, alpha, magnitude), {} if shared and len(present) == 3 else ranges


def apart(update: Update, weights: dict[str, Tensor], ranges: Any, stabilized: bool) -> dict[str, Update]:
    """The updates of the parts of c_attn; `ranges` None: all rows of A to all three.

    Raises:
        ValueError: ranges that do not fit the tensors.
    """
    if ranges is None:
        ranges = {part: [0, update.rank, update.alpha] for part in PARTS}
    elif not _fit(ranges, update, weights, stabilized):
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


def _thirds(update: Update) -> dict[str, tuple[Tensor, Tensor | None]]:
    d = len(update.B) // 3
    lengths = [None] * 3 if update.magnitude is None else update.magnitude.split(d)
    return dict(zip(PARTS, zip(update.B.split(d), lengths, strict=True), strict=True))


def _fit(ranges: Any, update: Update, weights: dict[str, Tensor], stabilized: bool) -> bool:
    """Whether the rest of each third of B is zero, and each part's alpha is that of the whole."""
    if not isinstance(ranges, dict) or not ranges or ranges.keys() - {*PARTS}:
        return False
    for part, (rows, length) in _thirds(update).items():
        if part not in ranges:
            norms = row_norms(weights[part].float())
            if bool(rows.any()) or (length is not None and not torch.allclose(length.float(), norms, rtol=1e-4)):
                return False
            continue
        if not isinstance(ranges[part], list) or [type(n) for n in ranges[part][:2]] != [int, int]:
            return False
        start, stop, *alpha = ranges[part]
        if not 0 <= start < stop <= update.rank or len(alpha) != 1 or type(alpha[0]) not in (int, float):
            return False
        ratio = (stop - start) / update.rank
        if not math.isclose(alpha[0], update.alpha * (math.sqrt(ratio) if stabilized else ratio), rel_tol=1e-9):
            return False
        if bool(rows[:, :start].any()) or bool(rows[:, stop:].any()):
            return False
    return True

"""How far the shares of the kinds in a part of the rows lie from what chance allows."""

from collections.abc import Hashable, Sequence

import numpy as np


def numbered(values: Sequence[Hashable]) -> np.ndarray:
    """Each value as a number from 0."""
    order = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([order[value] for value in values])


def worst(kinds: Sequence[Hashable], parts: Sequence[Hashable], groups: Sequence[Hashable] | None = None) -> float:
    """Over all kinds and parts, the largest |count - what the kind's share of all rows would give|, in standard errors.

    A part is whole groups (films, say; by default single rows) drawn without replacement: m of M groups, of which each
    has a count that is r off, have a sum with the variance m (1 - m / M) sum(r^2) / (M - 1): Cochran 1977, theorem 2.2.
    For single rows that is the variance of the hypergeometric distribution.
    """
    group = numbered(range(len(kinds)) if groups is None else groups)
    kind, part = numbered(kinds), numbered(parts)
    n_groups, largest = group.max() + 1, 0.0
    part_of_group = np.zeros(n_groups, dtype=int)
    part_of_group[group] = part
    for own in range(kind.max() + 1):
        off = np.bincount(group, (kind == own) - np.mean(kind == own), n_groups)
        for chosen in (part_of_group == number for number in range(part.max() + 1)):
            variance = chosen.sum() * (1 - chosen.mean()) * (off**2).sum() / (n_groups - 1)
            largest = max(largest, abs(off[chosen].sum()) / variance**0.5)
    return largest

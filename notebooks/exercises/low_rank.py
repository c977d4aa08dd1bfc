"""Checkers of notebook 07."""

import torch
from torch import Tensor

from exercises.verdict import called, checker, given, require, same

SINGULAR_VALUES = (5.0, 3.0, 2.0, 1.0, 0.5)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_singular_values(values: tuple[float, ...], d_out: int, d_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, k], S [k], Vh [k, d_in] of a matrix whose singular values are known."""
    U = torch.linalg.qr(_random(d_out, len(values), seed=1)).Q
    V = torch.linalg.qr(_random(d_in, len(values), seed=2)).Q
    return U, torch.tensor(values, dtype=torch.float64), V.T


@checker
def check_extracted_lora(extracted_lora) -> str:
    """extracted_lora(delta [d_out, d_in], r, alpha) -> A [r, d_in], B [d_out, r], and the norm of what is left out."""
    U, S, Vh = _with_singular_values(SINGULAR_VALUES, 7, 6)
    delta = (U * S) @ Vh
    for r, alpha in ((2, 2.0), (2, 6.0), (3, 1.0)):
        result = given(called(extracted_lora, delta, r, alpha))
        require(isinstance(result, tuple) and len(result) == 3, "return three things: A, B and the error")
        A, B, error = (given(part) for part in result)
        require(tuple(A.shape) == (r, 6), f"A has shape {list(A.shape)}, it should be [r, d_in] = [{r}, 6]")
        require(tuple(B.shape) == (7, r), f"B has shape {list(B.shape)}, it should be [d_out, r] = [7, {r}]")
        scale = alpha / r

        def product(values: Tensor, kept: slice) -> Tensor:
            return (U[:, kept] * values[kept]) @ Vh[kept]

        first, last = slice(0, r), slice(len(S) - r, None)
        best = product(S, first)
        found = torch.linalg.svd(delta, full_matrices=False)
        hints = {
            "LoRA multiplies B A by alpha / r, so the factors must divide by it, once": scale * best,
            "the factors multiply by alpha / r; they must divide by it": scale**2 * best,
            "the factors divide by alpha / r twice, once in each": best / scale,
            "those are the last singular directions; the strongest ones come first": product(S, last),
            "torch.linalg.svd returns Vh = V transposed: its rows are the directions, not its columns":
                (found.U[:, :r] * found.S[:r]) @ found.Vh.T[:r],
            "the singular values are missing: U and V hold directions only": product(torch.ones_like(S), first),
            "the singular values are in both factors, so their squares are in the product": product(S.square(), first),
        }  # fmt: skip
        same(scale * B @ A, best, hints, "(alpha / r) B A")
        left = S[r:]
        hints = {
            "that is the square of the norm; take its root": left.square().sum(),
            "that is the norm of what is kept, not of what is left out": S[:r].square().sum().sqrt(),
            "the Frobenius norm adds squares, and takes the root": left.sum(),
            "that is the largest of the singular values left out: the spectral norm of the error": left[0],
            "a share, where the norm itself is asked for": left.square().sum().sqrt() / S.square().sum().sqrt(),
        }
        same(error, left.square().sum().sqrt(), hints, "the error")
    return "no LoRA of that rank comes closer, and the error is known from the singular values alone."


@checker
def check_rank_for_share(rank_for_share) -> str:
    """rank_for_share(delta, share): the smallest r whose best approximation keeps that share of the squared norm."""
    cases = ((SINGULAR_VALUES, 0.9), (SINGULAR_VALUES, 0.5), ((2.0, 2.0, 2.0, 2.0), 0.6), ((3.0, 1.0), 0.99))
    for values, share in cases:
        U, S, Vh = _with_singular_values(values, 8, 6)
        squares = S.square().cumsum(0) / S.square().sum()
        sums = S.cumsum(0) / S.sum()
        expected = 1 + int((squares < share).sum())
        hints = {
            "the singular values are added up, not their squares": 1 + int((sums < share).sum()),
            "one too few: those directions still lack a little": expected - 1,
            "one too many: one direction fewer keeps that share as well": expected + 1,
        }
        got = called(rank_for_share, (U * S) @ Vh, share)
        same(got, expected, hints, f"the rank that keeps {share:.0%} where the singular values are {values}")
        require(float(got).is_integer(), "a rank is a whole number")
    return "the squared norm of a matrix is the sum of its squared singular values."


@checker
def check_subspace_similarity(subspace_similarity) -> str:
    """subspace_similarity(X [m, d], Y [n, d], i, j): phi of the top right singular vectors, and its mean by chance."""
    scales = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0], dtype=torch.float64)[:, None]
    X = _random(5, 12, seed=3) * scales
    Y = _random(5, 12, seed=4) * scales + 0.8 * X
    u, v = (torch.linalg.svd(M, full_matrices=False) for M in (X, Y))
    for i, j in ((1, 1), (2, 4), (4, 2), (5, 5)):
        result = given(called(subspace_similarity, X, Y, i, j))
        require(isinstance(result, tuple) and len(result) == 2, "return two things: phi and its mean by chance")
        phi, chance = (given(part) for part in result)
        overlap = (u.Vh[:i] @ v.Vh[:j].T).norm()
        expected = overlap.square() / min(i, j)
        rows = (X[:i] @ Y[:j].T).norm().square() / min(i, j)
        hints = {
            "not divided by min(i, j)": overlap.square(),
            "divided by the larger of i and j: a line inside a plane should give 1": overlap.square() / max(i, j),
            "divided by i, so the order of the two would matter": overlap.square() / i,
            "the norm is not squared": overlap / min(i, j),
            "those are left singular vectors; what a map reads from its input are the right ones":
                (u.U[:, :i].T @ v.U[:, :j]).norm().square() / min(i, j),
            "torch.linalg.svd returns Vh = V transposed: its rows are the directions, not its columns":
                (u.Vh[:, :i].T @ v.Vh[:, :j]).norm().square() / min(i, j),
            "the rows themselves are compared: they have lengths, and are not at right angles": rows,
            "those are the last directions; the strongest ones come first":
                (u.Vh[-i:] @ v.Vh[-j:].T).norm().square() / min(i, j),
        }  # fmt: skip
        same(phi, expected, hints, f"phi for i={i}, j={j}")
        hints = {
            "chance is not zero: any 12 directions would hold all of any other": 0.0,
            "i j squared cosines, each 1 / d on average, divided by min(i, j): that leaves the larger": min(i, j) / 12,
            "the sum of the i j squared cosines still has to be divided by min(i, j)": i * j / 12,
            "d is the length of a direction, not the number of directions": max(i, j) / 5,
            "that is the mean for a single pair of directions": 1 / 12,
        }
        same(chance, max(i, j) / 12, hints, f"the mean by chance for i={i}, j={j}")
    return "0: nothing in common; max(i, j) / d: chance; 1: the smaller subspace lies inside the larger one."


@checker
def check_gradient_of_z(gradient_of_z) -> str:
    """gradient_of_z(g [D], column [D], sign [D], d): the transpose of P times g, without P."""
    g = torch.tensor([1.0, 2.0, -4.0, 0.5, 8.0, 3.0, -2.0, 16.0])
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    for column, d in (([0, 1, 2, 0, 1, 2, 0, 1], 3), ([3, 1, 3, 3, 0, 1, 0, 3], 5)):  # no weight follows z[2] and z[4]
        column = torch.tensor(column)
        P = torch.zeros(len(g), d)
        P[torch.arange(len(g)), column] = sign
        times = P.abs().sum(dim=0)
        last = torch.zeros(d)
        for place, value in zip(column.tolist(), (sign * g).tolist(), strict=True):
            last[place] = value
        hints = {
            "the signs are missing": P.abs().T @ g,
            "one number for each weight: add up those that follow the same number of z": sign * g,
            "the mean of each column, where the sum is asked for": P.T @ g / times.clamp(min=1),
            "only one weight of each column is counted; `x[index] += y` does not add up where an index occurs twice":
                last,
            "columns that no weight follows are missing: their gradient is 0": (P.T @ g)[: int(column.max()) + 1],
        }  # fmt: skip
        got = called(gradient_of_z, g, column, sign, d)
        same(got, P.T @ g, hints, f"the gradient of z, d={d}")
    return "it is the transpose of P times g: each number of z hears the sum of all weights that follow it."

"""Checkers of notebook 04."""

import math

import torch

from exercises.verdict import called, checker, given, require, same


@checker
def check_lora_forward(lora_forward) -> str:
    """lora_forward(x [..., d_in], W0 [d_out, d_in], A [r, d_in], B [d_out, r], alpha) -> [..., d_out]."""
    generator = torch.Generator().manual_seed(0)
    x, W0, A, B = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 2, 6), (7, 6), (3, 6), (7, 3))
    )
    update = x @ A.T @ B.T
    expected = x @ W0.T + 2.0 / 3 * update
    hints = {
        "alpha is not divided by the rank": x @ W0.T + 2.0 * update,
        "the frozen map's own output is missing": 2.0 / 3 * update,
        "alpha is divided by the root of the rank: that is the rank-stabilised variant": x @ W0.T
        + 2.0 / math.sqrt(3) * update,
        "the scale is missing": x @ W0.T + update,
        "the scale also changes what the frozen map gives": 2.0 / 3 * (x @ W0.T + update),
    }
    same(called(lora_forward, x, W0, A, B, 2.0), expected, hints, "the output")
    return "y = W0 x + (alpha / r) B A x."


@checker
def check_start(start) -> str:
    """start(train, r, d_in, d_out) -> A [r, d_in], B [d_out, r] for train "AB", "A" or "B"."""
    for train in ("AB", "A", "B"):
        result = called(start, train, 4, 10, 12)
        require(isinstance(result, tuple) and len(result) == 2, "return two tensors, A and B")
        A, B = (given(part) for part in result)
        require(tuple(A.shape) == (4, 10), f"A has shape {list(A.shape)}, it should be [r, d_in] = [4, 10]")
        require(tuple(B.shape) == (12, 4), f"B has shape {list(B.shape)}, it should be [d_out, r] = [12, 4]")
        require(bool((B @ A == 0).all()), f'train="{train}": B A is not zero, so attaching changes the model')
        zero = {"A": bool((A == 0).all()), "B": bool((B == 0).all())}
        require(not all(zero.values()), f'train="{train}": both are zero, so neither gets a gradient, ever')
        other = B if zero["A"] else A
        require(
            int(torch.linalg.matrix_rank(other.double())) == 4,
            f'train="{train}": the r directions of {"B" if zero["A"] else "A"} are not independent, and so they stay: '
            f"draw them at random",
        )
        (fixed,) = (name for name, is_zero in zero.items() if is_zero)
        require(
            fixed in train,
            f'train="{train}": {fixed} is zero and frozen, so B A stays zero; the trained factor is the one at zero',
        )
    return "zero at the start, and able to leave zero."


@checker
def check_sum_of_loras(sum_of_loras) -> str:
    """sum_of_loras(A1, B1, A2, B2, w1, w2) -> A, B with B A = w1 B1 A1 + w2 B2 A2."""
    for r1, r2 in ((2, 2), (2, 3)):
        generator = torch.Generator().manual_seed(0)
        shapes = ((r1, 6), (5, r1), (r2, 6), (5, r2))
        A1, B1, A2, B2 = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        result = called(sum_of_loras, A1, B1, A2, B2, 0.25, 0.75)
        require(isinstance(result, tuple) and len(result) == 2, "return two tensors, A and B")
        A, B = (given(part).double() for part in result)
        require(
            A.shape[-1] == 6 and B.shape[0] == 5 and A.shape[0] == B.shape[-1],
            f"A {list(A.shape)} and B {list(B.shape)} do not fit [r, d_in] and [d_out, r] with d_in = 6, d_out = 5",
        )
        hints = {
            "the weights act twice, once in each factor": 0.25**2 * B1 @ A1 + 0.75**2 * B2 @ A2,
            "the weights are missing": B1 @ A1 + B2 @ A2,
            "the weights have changed places": 0.75 * B1 @ A1 + 0.25 * B2 @ A2,
        }
        if r1 == r2:
            cross = "that averages the factors: their product has cross terms, B1 A2 and B2 A1, of no task"
            hints[cross] = (0.25 * B1 + 0.75 * B2) @ (0.25 * A1 + 0.75 * A2)
            hints["that adds the factors: their product has cross terms, B1 A2 and B2 A1"] = (B1 + B2) @ (A1 + A2)
        same(B @ A, 0.25 * B1 @ A1 + 0.75 * B2 @ A2, hints, "B A")
        require(
            len(A) == r1 + r2,
            f"right, but of rank {len(A)}: the factors side by side need r1 + r2 = {r1 + r2}, so the sum stays thin",
        )
    return "the exact sum, at the price of the sum of the ranks."


@checker
def check_break_even_rank(break_even_rank) -> str:
    """break_even_rank(d_in, d_out): the largest r at which A and B hold fewer parameters than the weight itself."""
    for d_in, d_out in ((128, 128), (128, 512), (6, 3), (10, 10)):
        expected = max(r for r in range(d_in) if r * (d_in + d_out) < d_in * d_out)
        hints = {
            "at this rank there are as many parameters as in the weight, not fewer": expected + 1,
            "that is the highest rank that the update can have, not the one that saves": min(d_in, d_out),
        }
        got = called(break_even_rank, d_in, d_out)
        same(got, expected, hints, f"the rank for d_in={d_in}, d_out={d_out}")
        require(float(got).is_integer(), "a rank is a whole number")
    return "r (d_in + d_out) < d_in d_out."

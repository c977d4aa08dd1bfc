"""Checkers of notebook 00: so that readers see what a checker is like."""

import torch

from exercises.verdict import called, checker, same


@checker
def check_linear(linear) -> str:
    """linear(x [..., d_in], W [d_out, d_in], b [d_out]) -> [..., d_out]."""
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 5, 3), (4, 3), (4,)))
    hints = {
        "the bias is missing": x @ W.T,
        "the bias is subtracted": x @ W.T - b,
    }
    same(called(linear, x, W, b), x @ W.T + b, hints, "the output")
    square = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    hints = {
        "with a square W it shows: the weight must be transposed, its rows are outputs": x @ square + x.new_zeros(3)
    }
    same(called(linear, x, square, x.new_zeros(3)), x @ square.T, hints, "the output of a square map")
    return "y = x Wᵀ + b, for any number of axes in front."


@checker
def check_share(share) -> str:
    """share(trained, frozen): the trained parameters as a percentage of the base model's."""
    for trained, frozen in ((8_192, 827_776), (500, 1_000)):
        hints = {
            "that is a fraction; a percentage is a hundred times as large": trained / frozen,
            "the share is of the base model's parameters, not of all": 100 * trained / (frozen + trained),
            "that is how many frozen parameters there are for each trained one": frozen / trained,
        }
        same(called(share, trained, frozen), 100 * trained / frozen, hints, f"the share of {trained:,} to {frozen:,}")
    return "the share that all tables here give."

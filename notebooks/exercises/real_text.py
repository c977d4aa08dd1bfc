"""Checkers of notebook 12."""

import math

import torch

from exercises.verdict import called, checker, given, require, same


@checker
def check_mean_pool(mean_pool) -> str:
    """mean_pool(hidden [B, T, d], padding_mask [B, T]) -> the mean over the real positions [B, d]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    weights = mask[:, :, None].double()
    total = (hidden * weights).sum(1)
    hints = {
        "padding is averaged in": hidden.mean(1),
        "the sum over the real positions is divided by all positions": total / 4,
        "the sum is not divided": total,
        "that is the first position alone": hidden[:, 0],
    }
    same(called(mean_pool, hidden, mask), total / weights.sum(1), hints, "the mean")
    return "a sentence is the mean of its words, however much padding stands behind it."


@checker
def check_held_out(held_out) -> str:
    """held_out(films [one for each sentence], share) -> (rows for training, rows for the test), whole films apart."""
    films = ["a", "b", "a", "c", "d", "b", "d", "d", "e", "f", "g", "h", "i", "j"]
    result = called(held_out, films, 0.2)
    require(isinstance(result, tuple) and len(result) == 2, "return two lists of row numbers")
    train, test = (list(given(part)) for part in result)
    require(sorted(train + test) == list(range(len(films))), "every row must be in one of the two, and in one only")
    both = {films[row] for row in train} & {films[row] for row in test}
    require(
        not both,
        f"the films {', '.join(sorted(both))} are in both: their test sentences reward knowing the film",
    )
    n = len({films[row] for row in test})
    require(n == 2, f"{n} of the 10 films are held out; a share of 0.2 of the *films* is 2")
    return "no film is on both sides."


@checker
def check_standard_error(standard_error) -> str:
    """standard_error(accuracy, n): of an accuracy measured on n sentences."""
    for accuracy, n in ((0.8, 970), (0.5, 100)):
        expected = math.sqrt(accuracy * (1 - accuracy) / n)
        hints = {
            "the root is missing": accuracy * (1 - accuracy) / n,
            "that is the spread of one sentence; the mean of n of them has less": math.sqrt(accuracy * (1 - accuracy)),
            "with the accuracy goes its complement: p (1 - p)": math.sqrt(accuracy / n),
        }
        same(called(standard_error, accuracy, n), expected, hints, f"the error of {accuracy} on {n} sentences")
    return "differences below it are not findings, whatever the seeds say."

"""Checkers of notebook 02."""

import math

import torch
import torch.nn.functional as F

from exercises.verdict import called, checker, require, same


@checker
def check_answer_loss(answer_loss) -> str:
    """answer_loss(logits [B, T, V], padding_mask [B, T], targets [B]): cross-entropy at each row's last real word."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 9, generator=generator)
    targets = torch.tensor([4, 0, 7])
    right = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()

    def at(positions, reduction="mean"):
        return F.cross_entropy(logits[torch.arange(3), torch.tensor(positions)], targets, reduction=reduction)

    hints = {
        "it reads the last column, which is padding in two of the three rows": at([5, 5, 5]),
        "it reads one position past the last real word": at([5, 4, 2]),
        "it reads one position before the last real word": at([4, 2, 0]),
        "the losses of the rows are summed; take their mean": at([5, 3, 1], "sum"),
    }
    same(called(answer_loss, logits, right, targets), at([5, 3, 1]), hints, "the loss with padding on the right")
    left = right.flip(1)
    hints = {
        "with padding on the left the count of real words is not the place of the last one": at([5, 3, 1]),
    }
    same(called(answer_loss, logits, left, targets), at([5, 5, 5]), hints, "the loss with padding on the left")
    return "wherever the padding lies, the answer is read at the last real word."


@checker
def check_training_bytes(training_bytes) -> str:
    """training_bytes(total, trained): bytes of weights, gradients and Adam's state in float32."""
    for total, trained in ((827_776, 827_776), (827_776, 8_192)):
        expected = 4 * (total + 3 * trained)
        hints = {
            "a float32 number takes four bytes": expected // 4,
            "one is missing of the three beside a trained parameter: its gradient, and Adam's two running means": 4
            * (total + 2 * trained),
            "Adam's two running means are missing, of the gradient and of its square": 4 * (total + trained),
            "gradients and Adam's state exist for trained parameters only": 4 * 4 * total,
            "the weights are needed whether they are trained or not": 4 * 4 * trained,
        }
        same(called(training_bytes, total, trained), expected, hints, f"the bytes for {trained:,} trained of {total:,}")
    return "four values for each trained weight, one for each frozen one."


@checker
def check_forgetting(forgetting) -> str:
    """forgetting(before, after): two losses in nats per word -> by what factor the perplexity has grown."""
    for before, after in ((1.0, 3.5), (0.9, 0.9)):
        expected = math.exp(after - before)
        hints = {
            "that is the difference of the losses; perplexity is exp(loss)": after - before,
            "that is the quotient of the losses, not of the perplexities": after / before,
            "before and after have changed places": math.exp(before - after),
        }
        same(called(forgetting, before, after), expected, hints, "the factor")
    require(called(forgetting, 2.0, 1.0) < 1, "a loss that falls must give a factor below 1")
    return "a difference of losses is a quotient of perplexities."

"""Checkers of notebook 15."""

import torch

from exercises.verdict import called, checker, given, require, same
from minitransformer import TransformerConfig
from peft import LoRA, PrefixTuning, expected_parameters

END = 2  # ends a turn, and pads


@checker
def check_answer_targets(answer_targets) -> str:
    """answer_targets(tokens [N, T], n_prompt [N], length [N]) -> the token that each position should say, or -100."""
    tokens = torch.tensor([[5, END, 7, 8, 9, END], [4, 6, END, 3, END, END], [6, 8, END, END, END, END]])
    n_prompt, length = torch.tensor([3, 3, 2]), torch.tensor([6, 5, 3])
    place = torch.arange(6)
    behind, real = place >= n_prompt[:, None], place < length[:, None]

    def asked(which, shift=1):
        said = torch.where(which, tokens, -100)
        return torch.cat([said[:, shift:], torch.full((3, shift), -100)], dim=1)

    hints = {
        "each position is asked for its own token, which it sees; it should say the next one": asked(behind & real, 0),
        "that is shifted by two; a position should say the very next token": asked(behind & real, 2),
        "the prompt is asked for as well: most of the loss would be about writing the question": asked(real),
        "padding is asked for as well: the loss would be about saying the end again and again": asked(behind),
        "the end of the turn is not asked for, so the model never learns to stop": asked(
            behind & real & (tokens != END)
        ),
        "the answer's first token is not asked for; the prompt's last position should say it": asked(
            (place > n_prompt[:, None]) & real
        ),
        "the prompt is asked for, and the answer is not": asked(~behind),
        "everything is asked for, padding too": asked(torch.ones_like(real)),
    }
    same(called(answer_targets, tokens, n_prompt, length), asked(behind & real), hints, "the targets")
    return "the answer and the end of its turn, each asked for at the position before."


@checker
def check_left_padded(left_padded) -> str:
    """left_padded(rows of unequal length, pad_id) -> tokens [N, T] and the padding mask [N, T], True for a real one."""
    rows = [[5, END, 7], [4, 6, 8, END, 3], [END, 9]]
    result = called(left_padded, rows, END)
    require(isinstance(result, tuple) and len(result) == 2, "return two tensors, the tokens and their mask")
    tokens, mask = (given(part) for part in result)
    fill = [5 - len(row) for row in rows]
    expected = torch.tensor([[END] * n + row for n, row in zip(fill, rows, strict=True)])
    real = torch.tensor([[False] * n + [True] * len(row) for n, row in zip(fill, rows, strict=True)])
    right = torch.tensor([row + [END] * n for n, row in zip(fill, rows, strict=True)])
    cut = torch.tensor([row[-2:] for row in rows])
    hints = {
        "padding stands on the right: generation would go on behind it": right,
        "the rows are cut to the shortest one": cut,
    }
    same(tokens, expected, hints, "the tokens")
    hints = {
        "an end of turn inside a row is hidden: it is the padding token, but it is real": expected != END,
        "the mask is upside down: True says that a token is real": ~real,
        "nothing is masked, so every row would read its padding": torch.ones_like(real),
    }
    same(mask, real, hints, "the mask")
    return "padding in front, and a mask that comes from the lengths, not from the tokens."


@checker
def check_grouped_parameters(grouped_parameters) -> str:
    """grouped_parameters(r, n, n_layers, d_model, n_heads, n_kv_heads): of LoRA on query and value, and of a prefix."""
    for r, n, layers, d, heads, kv in ((8, 16, 30, 576, 9, 3), (4, 5, 2, 64, 8, 1)):
        config = TransformerConfig(10, 10, d_model=d, n_layers=layers, n_heads=heads, n_kv_heads=kv)
        lora, prefix = (expected_parameters(config, recipe) for recipe in (LoRA(rank=r), PrefixTuning(length=n)))
        result = called(grouped_parameters, r, n, layers, d, heads, kv)
        require(isinstance(result, tuple) and len(result) == 2, "return two numbers, LoRA's and the prefix's")
        own, theirs = (given(part) for part in result)
        width = d * kv // heads
        what = f"r={r}, n={n}, {layers} layers, {d} wide, {heads} heads, {kv} of keys and values"
        hints = {
            "value has fewer outputs than query: its heads are shared": layers * 4 * r * d,
            "query has d_model outputs; only keys and values have fewer heads": layers * 2 * r * (d + width),
            "every layer has its own": lora / layers,
            "value has d_model inputs, as query has; its outputs are fewer": layers * r * (2 * d + 2 * width),
        }
        same(own, lora, hints, f"LoRA's count for {what}")
        hints = {
            "a prefix's keys are as wide as the model's keys: n_kv_heads heads, not n_heads": layers * 2 * n * d,
            "keys *and* values are learned": prefix / 2,
            "every layer has its own": prefix / layers,
            "that is one head; there are n_kv_heads": prefix / kv,
        }
        same(theirs, prefix, hints, f"the prefix's count for {what}")
    return "grouped queries make the value's LoRA thinner, and the prefix by the whole ratio of heads."


@checker
def check_rounding_loss(rounding_loss) -> str:
    """rounding_loss(W [d_out, d_in], delta): the error of a merge into bfloat16, as a share of the update's norm."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 16, generator=generator).bfloat16().float()
    for size in (1e-1, 1e-3):
        delta = size * torch.randn(24, 16, generator=generator)
        merged = (W + delta).bfloat16().float()
        error, norm = (merged - (W + delta)).norm(), delta.norm()
        hints = {
            "that is the error as a share of the whole weight; the update is what may be lost": error
            / (W + delta).norm(),
            "the update alone is rounded; what is kept is the rounded *sum*": (delta.bfloat16().float() - delta).norm()
            / norm,
            "that is the size of the update that arrives, not its distance from the one that was meant": (
                merged - W
            ).norm()
            / norm,
            "that is the square": (error / norm).square(),
            "that is the error itself; divide it by the norm of the update": error,
            "the update is rounded before the sum as well": (
                (W.bfloat16() + delta.bfloat16()).float() - (W + delta)
            ).norm()
            / norm,
        }
        got = called(rounding_loss, W, delta)
        got = got.float() if isinstance(got, torch.Tensor) else got
        what = f"the error for an update of about {size:g} in a weight of about 1"
        same(got, error / norm, hints, what)
    return "16 bits keep three digits of the sum, so of a small update next to nothing arrives."

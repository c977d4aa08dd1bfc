"""Checkers of notebook 06."""

import math

import torch

from exercises.verdict import called, checker, given, require, same
from minitransformer import TransformerConfig
from peft import BottleneckAdapter, LoRA, PrefixTuning, expected_parameters


@checker
def check_prefix_share(prefix_share) -> str:
    """prefix_share(prefix_scores [..., n], text_scores [..., S]) -> lambda [...]; -inf is a word not to be seen."""
    generator = torch.Generator().manual_seed(0)
    front, text = (torch.randn(2, 4, size, generator=generator, dtype=torch.float64) for size in (3, 4))
    causal = torch.ones(4, 4).tril().bool()
    text = text.masked_fill(~causal, -math.inf)
    weights = torch.cat([front, text], dim=-1).softmax(dim=-1)
    seen = causal.sum(dim=-1).expand(2, 4)
    mean_of_text = text.exp().sum(dim=-1) / seen
    hints = {
        "that is the share of the text; lambda is that of the prefix": 1 - weights[..., :3].sum(dim=-1),
        "those are the weights of the single prefix positions; lambda is their sum": weights[..., :3],
        "lambda is not the share of the positions but of the *weight*: it depends on the scores": 3 / (3 + seen),
        "each group counts with the sum of its exp(scores), not with their mean": front.exp().mean(dim=-1)
        / (front.exp().mean(dim=-1) + mean_of_text),
        "each group counts with all of its scores, not only with the largest": torch.sigmoid(
            front.amax(dim=-1) - text.amax(dim=-1)
        ),
        "that compares the prefix with the text, as a quotient; lambda is a share of both": front.exp().sum(dim=-1)
        / text.exp().sum(dim=-1),
    }
    same(called(prefix_share, front, text), weights[..., :3].sum(dim=-1), hints, "lambda")
    large = given(called(prefix_share, 1000 + front, 1000 + text))
    require(
        not bool(torch.isnan(torch.as_tensor(large)).any()),
        "with scores of about 1,000 lambda is NaN: exp of them is no number any more; logsumexp avoids that",
    )
    same(large, weights[..., :3].sum(dim=-1), what="lambda of scores of about 1,000")
    return "lambda is the sigmoid of a difference of two logsumexps."


@checker
def check_adapted(adapted) -> str:
    """adapted(module, x [..., d], W_down [m, d], W_up [d, m], s, form): a bottleneck behind a module or beside it."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6), (6, 6), (3, 6), (6, 3))
    x, frozen, down, up = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    h, s = torch.tanh(x @ frozen.T), 4.0

    def change(read):
        return torch.relu(read @ down.T) @ up.T

    for form, read, other in (("sequential", h, x), ("parallel", x, h)):
        right, wrong = ("h, what the module gives", "x") if form == "sequential" else ("x, what the module reads", "h")
        hints = {
            f'"{form}": the bottleneck reads {right}, not {wrong}': h + s * change(other),
            f'"{form}": the scale s is missing': h + change(read),
            f'"{form}": s belongs to the change alone, h comes out as it is': s * (h + change(read)),
            f'"{form}": h is missing: the change is added to what the module gives': s * change(read),
            f'"{form}": the change is added to h, what the module gives, not to x': x + s * change(read),
            f'"{form}": without the relu two linear layers are one': h + s * (read @ down.T @ up.T),
        }
        got = called(adapted, lambda z: torch.tanh(z @ frozen.T), x, down, up, s, form)
        same(got, h + s * change(read), hints, f'the output for "{form}"')
    return "behind it reads h, beside it reads x; both add to h."


@checker
def check_same_price(same_price) -> str:
    """same_price(n, d_model) -> m, r: the largest bottleneck and LoRA rank that cost no more than a prefix of n."""
    for n, d in ((8, 128), (24, 16), (7, 20)):
        config = TransformerConfig(vocab_size=9, max_len=9, d_model=d, n_heads=4, n_layers=1, d_ff=d)
        budget = expected_parameters(config, PrefixTuning(length=n))
        widths = [BottleneckAdapter(bottleneck=m, placement="pfeiffer") for m in range(1, n + 1)]
        m = sum(expected_parameters(config, recipe) <= budget for recipe in widths)
        r = sum(expected_parameters(config, LoRA(rank=rank)) <= budget for rank in range(1, min(n, d) + 1))
        result = given(called(same_price, n, d))
        require(isinstance(result, tuple) and len(result) == 2, "return two numbers, m and r")
        got_m, got_r = (given(part) for part in result)
        where = f"for n={n}, d_model={d}"
        hints = {
            f"m = n is too dear {where}: an adapter has biases as well": n,
            f"m is too large {where}: an adapter has m biases inside and d_model at its output": n - 1,
            f"a prefix is keys *and* values, so it has twice the parameters {where}": (n * d - d) // (2 * d + 1),
        }
        same(got_m, m, hints, f"m {where}")
        hints = {
            "LoRA on query *and* value has two pairs of A and B in each block": n,
            "a prefix is keys *and* values, so it has twice the parameters": n // 4,
        }
        same(got_r, r, hints, f"r {where}")
    return "m is n but for the biases, and r is half of n."

"""Checkers of notebook 03."""

import math

import torch

from exercises.verdict import called, checker, given, require, same
from minitransformer import TransformerConfig
from peft import PrefixTuning, PromptTuning, expected_parameters
from peft.functional import gated_attention, prefix_attention


def _case():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 4, 8)] * 3 + [(1, 2, 3, 8)] * 2
    q, k, v, prefix_k, prefix_v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    causal = torch.ones(4, 4).tril().bool()[None, None]
    return q, k, v, prefix_k, prefix_v, causal


@checker
def check_prefix_mask(prefix_mask) -> str:
    """prefix_mask(mask [T, S], n) -> [T, n + S]: True where a query may look, the n prefix positions in front."""
    causal = torch.ones(4, 4).tril().bool()
    result = called(prefix_mask, causal, 3)
    require(isinstance(result, torch.Tensor), f"the result should be a tensor, it is {type(result).__name__}")
    hints = {
        "the prefix stands behind the text; it belongs in front": torch.cat([causal, torch.ones(4, 3).bool()], 1),
        "no query may look at the prefix: True means that it may": torch.cat([torch.zeros(4, 3).bool(), causal], 1),
        "early queries do not see the whole prefix: it is no text, it lies before all of it": torch.ones(4, 7).tril(),
        "the prefix has queries of its own: it should not, it only has keys and values": torch.ones(7, 7).tril(),
    }
    same(result.double(), torch.cat([torch.ones(4, 3).bool(), causal], 1).double(), hints, "the mask")
    padded = causal & torch.tensor([True, True, False, True])
    hints = {"it makes a causal mask of its own; the one that is given also hides padding": result.double()}
    expected = torch.cat([torch.ones(4, 3).bool(), padded], 1).double()
    same(called(prefix_mask, padded, 3).double(), expected, hints, "the mask of a text with padding")
    require(result.dtype == torch.bool, f"a mask is boolean, this one is {result.dtype}")
    return "every query sees the whole prefix, and the text as before."


@checker
def check_prefix_parameters(prefix_parameters) -> str:
    """prefix_parameters(n, n_layers, d_model) -> a dict with the keys "kv", "hidden" and "prompt"."""
    for n, layers, d in ((16, 4, 128), (5, 3, 24)):
        config = TransformerConfig(vocab_size=9, max_len=32, d_model=d, n_heads=4, n_layers=layers, d_ff=d)
        methods = {
            "kv": PrefixTuning(length=n),
            "hidden": PrefixTuning(length=n, at="hidden"),
            "prompt": PromptTuning(length=n),
        }
        counts = called(prefix_parameters, n, layers, d)
        require(isinstance(counts, dict) and set(counts) == set(methods), 'give a dict with "kv", "hidden", "prompt"')
        for name, method in methods.items():
            expected = expected_parameters(config, method)
            hints = {
                "keys and values are two tensors": expected / 2,
                'from "hidden" one tensor makes both, keys and values': expected * 2,
                "every layer has a prefix of its own": expected / layers,
                "a soft prompt enters at the input only, once": expected * layers,
            }
            same(given(counts[name]), expected, hints, f'the count of "{name}" for n={n}, {layers} layers, d_model={d}')
    return "the same as the closed forms of the recipes."


@checker
def check_mixture(mixture) -> str:
    """mixture(q, k, v, prefix_k, prefix_v, mask): attention with a prefix, as a mixture of two attentions."""
    q, k, v, prefix_k, prefix_v, causal = _case()
    expected = prefix_attention(q, k, v, prefix_k, prefix_v, causal)
    _, gate = gated_attention(q, k, v, prefix_k, prefix_v, causal)
    scale = 1 / math.sqrt(8)
    own = (q @ k.transpose(-2, -1) * scale).masked_fill(~causal, -math.inf).softmax(-1) @ v
    other = (q @ prefix_k.transpose(-2, -1) * scale).softmax(-1) @ prefix_v
    blind = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
    share = 3 / (3 + causal.sum(-1, keepdim=True))  # of the positions
    by_count = (1 - share) * own + share * other
    hints = {
        "the two attentions are added up; they must share one softmax's weight of 1": own + other,
        "lambda and 1 - lambda have changed places": gate * own + (1 - gate) * other,
        "lambda is not the share of the positions but of the *weight*: compare the sums of exp(scores)": by_count,
        "the mask is missing in the text's own attention": (1 - gate) * blind + gate * other,
        "the mask is missing: every query sees all of the text": prefix_attention(q, k, v, prefix_k, prefix_v),
        "what the prefix takes, the text must give: 1 - lambda of its own attention is left": own + gate * other,
        "the scores are not divided by sqrt(d_head)":
            prefix_attention(q / scale, k, v, prefix_k, prefix_v, causal),
    }  # fmt: skip
    same(called(mixture, q, k, v, prefix_k, prefix_v, causal), expected, hints, "the output")
    return "the same as attention over [P_k ; K] and [P_v ; V]."

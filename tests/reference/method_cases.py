"""What several tests here share: recipes of every method, and small batches."""

import inspect

import pytest
import torch

import peft
from peft import (
    ALL_LINEARS,
    IA3,
    BitFit,
    BottleneckAdapter,
    DoRA,
    LNTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    trainable_parameters,
)

RECIPES = {
    "lora": LoRA(rank=2, alpha=3.0),
    "lora all": LoRA(rank=3, alpha=8.0, targets=ALL_LINEARS),
    "lora A": LoRA(rank=2, train=("A",)),
    "lora B": LoRA(rank=2, train=("B",)),
    "lora rank-stabilised": LoRA(rank=4, alpha=4.0, rank_stabilized=True),
    "lora layer 1": LoRA(rank=2, targets=ALL_LINEARS, layers=(1,)),
    "dora": DoRA(rank=2, alpha=3.0, targets=ALL_LINEARS),
    "prefix kv": PrefixTuning(length=3),
    "prefix kv normal": PrefixTuning(length=3, init="normal"),
    "prefix hidden": PrefixTuning(length=3, at="hidden"),
    "prefix hidden normal": PrefixTuning(length=3, at="hidden", init="normal"),
    "prefix mlp": PrefixTuning(length=3, reparameterize=5),
    "prefix gated": PrefixTuning(length=3, gated=True),
    "prefix gated hidden": PrefixTuning(length=3, gated=True, at="hidden"),
    "prefix layer 1": PrefixTuning(length=3, layers=(1,)),
    "prompt": PromptTuning(length=3),
    "prompt normal": PromptTuning(length=3, init="normal"),
    "houlsby": BottleneckAdapter(bottleneck=5),
    "pfeiffer": BottleneckAdapter(bottleneck=5, placement="pfeiffer", activation="gelu"),
    "parallel": BottleneckAdapter(bottleneck=5, placement="parallel", activation="gelu_tanh", scale=4.0),
    "inside_ffn": BottleneckAdapter(bottleneck=5, placement="inside_ffn"),
    "houlsby layer 0": BottleneckAdapter(bottleneck=5, layers=(0,)),
    "bitfit": BitFit(),
    "bitfit layer 1": BitFit(layers=(1,)),
    "ia3": IA3(),
    "ia3 layer 0": IA3(layers=(0,)),
    "ln_tuning": LNTuning(),
    "ln_tuning layer 1": LNTuning(layers=(1,)),
}
# A method of the package that has no recipe above takes part with its defaults.
for kind in peft.Method.registry.values():
    known = any(type(recipe) is kind for recipe in RECIPES.values())
    if not known and kind.__module__.startswith("peft.methods.") and not inspect.isabstract(kind):
        RECIPES[kind.__name__.lower()] = kind()
UNCHANGED_AT_THE_START = [n for n in RECIPES if not n.startswith(("prefix", "prompt")) or "gated" in n]
SETS = {name: (recipe,) for name, recipe in RECIPES.items()} | {
    "prefix + parallel adapter": (RECIPES["prefix kv"], RECIPES["parallel"]),
    "lora + houlsby": (RECIPES["lora all"], RECIPES["houlsby"]),
    "everything": tuple(
        RECIPES[name] for name in ("houlsby", "bitfit", "inside_ffn", "lora all", "ia3", "prompt", "prefix hidden")
    ),
    "bitfit + ln_tuning": (RECIPES["bitfit"], RECIPES["ln_tuning"]),
    "dora + gated prefix + ia3": (RECIPES["dora"], RECIPES["prefix gated"], RECIPES["ia3"]),
}
# Other options of a method that is there already: where what is shown does not depend on them, they are slow.
VARIANTS = {
    "lora rank-stabilised", "lora layer 1", "prefix kv normal", "prefix hidden normal", "prefix gated hidden",
    "prefix layer 1", "prompt normal", "houlsby layer 0", "bitfit layer 1", "ia3 layer 0",
    "ln_tuning layer 1",
}  # fmt: skip


def each_of(argument, cases):
    """`pytest.mark.parametrize` over RECIPES or SETS, the variants marked as slow."""
    marks = {name: [pytest.mark.slow] if name in VARIANTS else [] for name in cases}
    return pytest.mark.parametrize(argument, [pytest.param(cases[n], id=n, marks=marks[n]) for n in cases])


def batch(vocab_size=23, rows=3, length=6, seed=1):
    """Tokens [rows, length], with a padding mask that is right-padded in the last rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[length - row] for row in range(rows)])
    return tokens, mask


def outputs(model, tokens=None, mask=None):
    """Hidden states at real tokens."""
    if tokens is None:
        tokens, mask = batch()
    with torch.no_grad():
        hidden = model.hidden(tokens, mask)
    return hidden if mask is None else hidden[mask]


def loss_of(model):
    """A scalar that every real position of every row has a part in."""
    tokens, mask = batch()
    logits = model(tokens, mask)[mask]
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).mean() + logits.logsumexp(-1).mean()


def train_a_little(model, seed=3, size=0.2):
    """Move every trainable tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def fingerprint(model):
    """Everything that must be as before when an operation failed: modules, weights, gradient flags, attributes."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        set(vars(model)),
        peft.attached(model),
    )


def assert_same(before, after):
    """Two fingerprints are equal, weights bit for bit."""
    assert before[0] == after[0] and before[2:] == after[2:]
    assert before[1].keys() == after[1].keys()
    for name, (identity, flag, values) in before[1].items():
        assert (identity, flag) == after[1][name][:2], name
        assert torch.equal(values, after[1][name][2]), name

"""All pairs of recipes, in both orders and precisions: one result, one gradient, one file; and nothing of it stays."""

from itertools import combinations

import pytest
import torch
from reference.method_cases import RECIPES, batch, outputs
from reference.plain_twin import PlainTwin
from reference.random_weights import randomize

import peft
from minitransformer import Transformer, TransformerConfig
from peft.methods.linear import MergeableLinear

# One recipe of each kind that a place can be entered in; the other pairs are slow.
MAIN = {
    torch.float32: ("lora all", "prefix hidden", "prompt", "houlsby", "inside_ffn", "bitfit", "ia3", "ln_tuning"),
    torch.bfloat16: ("lora all", "prefix hidden", "bitfit", "ia3", "ln_tuning"),
}
SLOW = pytest.mark.slow
KINDS = {"causal-pre": (True, "pre"), "encoder-post": (False, "post")}
CASES = [
    pytest.param(kind, dtype, pair, id=f"{kind}-{str(dtype).removeprefix('torch.')}-{pair[0]} + {pair[1]}",
                 marks=[] if kind == "causal-pre" and set(pair) <= set(MAIN[dtype]) else [SLOW])
    for kind in KINDS for dtype in (torch.float32, torch.bfloat16) for pair in combinations(RECIPES, 2)
]  # fmt: skip


def plain(kind, dtype):
    causal, norm = KINDS[kind]
    config = TransformerConfig(23, 12, 16, 2, 2, 24, causal=causal, norm=norm)
    return randomize(Transformer(config, seed=0), std=0.25).to(dtype)


def with_both(model, names):
    """Attached in this order, moved away from the start; None if it is refused."""
    for name in names:
        before = {n: id(m) for n, m in model.named_modules()}
        try:
            peft.attach(model, RECIPES[name], seed=list(RECIPES).index(name))
        except ValueError as error:
            assert "already" in str(error) or "order" in str(error)
            assert before == {n: id(m) for n, m in model.named_modules()}
            return None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(peft.trainable_parameters(model).items()):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def loss(logits):
    logits = logits.double()
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).mean() + logits.logsumexp(-1).mean()


def gradients(model):
    tokens, mask = batch()
    loss(model(tokens, mask)[mask]).backward()
    trained = peft.trainable_parameters(model)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {name: p.grad for name, p in trained.items()}


def assert_close(ours, exact, tolerance):
    assert (ours.double() - exact).norm() <= tolerance * exact.norm(), float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind, dtype, pair", CASES)
def test_a_pair_of_recipes_is_one_thing_in_both_orders(tmp_path, kind, dtype, pair):
    base = plain(kind, dtype)
    modules, bits = list(base.modules()), outputs(base)
    model = with_both(base, pair)
    other = with_both(plain(kind, dtype), pair[::-1])
    if model is None or other is None:
        assert model is other
        return
    tolerance = 2e-5 if dtype == torch.float32 else 0.06
    tokens, mask = batch()
    tensors = {name: t.double().requires_grad_() for name, t in peft.state_dict(model).items()}
    exact = PlainTwin(plain(kind, dtype).double(), [RECIPES[name] for name in pair], tensors).logits(tokens, mask)
    assert_close(model(tokens, mask)[mask].detach(), exact.detach(), tolerance)
    assert torch.equal(outputs(model), outputs(other)) and outputs(model).dtype == dtype
    loss(exact).backward()
    ours, theirs = gradients(model), gradients(other)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, theirs[name]), name
        if dtype == torch.float32:
            assert_close(gradient, tensors[name].grad, 1e-3)
    in_one = [torch.cat([own[name].flatten() for name in ours]) for own in (ours, {n: tensors[n].grad for n in ours})]
    assert_close(*in_one, 5 * tolerance)
    moved = outputs(model)
    peft.save(model, tmp_path / "file")
    assert torch.equal(outputs(peft.load(plain(kind, dtype), tmp_path / "file")), moved)
    with peft.disabled(model):
        assert torch.equal(outputs(model), bits)
    if dtype == torch.float32 and any(isinstance(module, MergeableLinear) for module in model.modules()):
        torch.testing.assert_close(outputs(peft.merge(model)), moved, rtol=1e-4, atol=1e-4)
        with peft.disabled(model):
            assert torch.equal(outputs(model), bits)
        assert torch.equal(outputs(peft.unmerge(model)), moved)
    peft.detach(model)
    assert torch.equal(outputs(model), bits) and list(model.modules()) == modules

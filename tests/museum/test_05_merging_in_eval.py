"""Merging as a side effect, and merging that drifts.

One library merges the update into the weight inside `eval()` and takes it out inside `train()`. Whoever loads LoRA
weights *after* calling `eval()` runs the old update, which is baked in, and nothing says so. Another takes the update
out again by subtracting it: in bfloat16 the weight does not come back to the bit. With one LoRA the loss is made in the
first round; where several take turns, or rounding always goes one way, it grows from round to round.

Found in: loralib's `Linear.train`; Hugging Face peft's `unmerge`

The lesson: a state that changes what the weights are has a name and a verb of its own, and never writes to W0.
"""

import torch
from exhibit import batch, caught, small_model
from torch import nn
from torch.nn import functional as F

import peft


class MergesInEval(nn.Module):
    """The wrong way: `eval()` writes B A into the weight."""

    def __init__(self, base):
        super().__init__()
        self.base, self.merged = base, False
        self.A = nn.Parameter(torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0)))
        self.B = nn.Parameter(torch.zeros(base.out_features, 2))

    def train(self, mode=True):
        if mode == self.merged:
            sign = -1 if mode else 1
            self.base.weight.data += sign * self.B.data @ self.A.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + F.linear(F.linear(x, self.A), self.B)


def check_weights_loaded_after_eval_count(layer):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    layer.eval()
    before = layer(x).detach()
    with torch.no_grad():
        layer.B.fill_(1.0)  # as loading a file does
    assert not torch.allclose(layer(x), before), "the loaded weights have no effect"


def test_weights_loaded_after_eval():
    linear = nn.Linear(16, 16)
    caught(check_weights_loaded_after_eval_count, MergesInEval(linear))
    model = peft.attach(nn.ModuleDict({"query": nn.Linear(16, 16)}), peft.LoRA(rank=2, targets=("query",)))
    check_weights_loaded_after_eval_count(model["query"])


def subtracting(weight, update, rounds):
    """The wrong way: what was added is taken away again."""
    for _ in range(rounds):
        weight += update
        weight -= update
    return weight


def check_a_hundred_rounds_leave_no_trace(rounds_of):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator).to(torch.bfloat16)
    update = (0.1 * torch.randn(64, 64, generator=generator)).to(torch.bfloat16)
    assert torch.equal(rounds_of(weight.clone(), update, 100), weight), "the weight has drifted"


def ours(weight, update, rounds):
    model = nn.ModuleDict({"query": nn.Linear(64, 64).to(torch.bfloat16)})
    with torch.no_grad():
        model["query"].weight.copy_(weight)
    layer = peft.attach(model, peft.LoRA(rank=64, alpha=64, targets=("query",)))["query"]
    with torch.no_grad():
        layer.A.copy_(torch.eye(64))
        layer.B.copy_(update)
    for _ in range(rounds):
        peft.unmerge(peft.merge(model))
    return layer.base.weight.detach()


def test_a_hundred_rounds():
    caught(check_a_hundred_rounds_leave_no_trace, subtracting)
    check_a_hundred_rounds_leave_no_trace(ours)


def test_disabling_a_merged_model_gives_the_base_and_leaves_it_merged():
    """One library's `disable_adapter` on a merged model unmerges it, and leaves it so."""
    (tokens, mask), model = batch(), small_model()
    base = model(tokens, mask)
    peft.attach(model, peft.LoRA(rank=2))
    with torch.no_grad():
        for p in peft.trainable_parameters(model).values():
            p.add_(0.1)
    peft.merge(model)
    merged = model(tokens, mask)
    with peft.disabled(model):
        assert torch.equal(model(tokens, mask), base)
    assert torch.equal(model(tokens, mask), merged) and "merged" in str(model)

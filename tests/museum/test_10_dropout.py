"""Dropout that is there, and is not.

LoRA's dropout is an argument that the constructor takes, and that no line of the forward pass reads. Or it is applied
to A, once for the whole batch: all rows lose the same inputs, which is another method.

Found in: https://github.com/meta-pytorch/torchtune/issues/996

The lesson: test an option by its effect: p = 0.5 must change the output in training, differently for each number, and
leave it alone in evaluation.
"""

import torch
from exhibit import caught
from torch import nn
from torch.nn import functional as F

import peft

P = 0.5


class Layer(nn.Module):
    """A LoRA layer for each sort of dropout; the frozen part is left out."""

    def __init__(self, sort):
        super().__init__()
        self.sort = sort
        self.A = nn.Parameter(torch.ones(1, 64))
        self.B = nn.Parameter(torch.ones(1, 1))
        self.dropout = nn.Dropout(P)

    def forward(self, x):
        A = self.A
        if self.sort == "the same for all rows":
            A = self.dropout(A)
        return F.linear(F.linear(x, A), self.B)  # with "never wired", self.dropout is simply not there


def ours():
    model = nn.ModuleDict({"map": nn.Linear(64, 1)})
    nn.init.zeros_(model["map"].weight)
    nn.init.zeros_(model["map"].bias)
    layer = peft.attach(model, peft.LoRA(rank=1, alpha=1, dropout=P, targets=("map",)))["map"]
    with torch.no_grad():
        layer.A.fill_(1.0)
        layer.B.fill_(1.0)
    return layer


def check_dropout(layer):
    x = torch.ones(500, 64)
    torch.manual_seed(0)
    in_training, in_evaluation = layer.train()(x), layer.eval()(x)
    assert torch.equal(in_evaluation, torch.full((500, 1), 64.0)), "evaluation must drop nothing"
    assert in_training.std() > 1.0, "nothing is dropped, or the same for every row"
    assert abs(in_training.mean() - 64.0) < 2.0, "what is kept must be scaled up by 1 / (1 - p)"


def test_dropout_of_x():
    caught(check_dropout, Layer("never wired"))
    caught(check_dropout, Layer("the same for all rows"))
    check_dropout(ours())

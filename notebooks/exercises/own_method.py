"""Checkers of notebook 14."""

import torch
from torch import Tensor, nn

from exercises.verdict import called, checker, given, require, same
from minitransformer import TransformerConfig
from peft import ALL_LINEARS, LoRA, Wrapper, expected_parameters
from peft.method import switched_off


class _Block(nn.Module):
    """Stands for a frozen block: a second argument, if given, is part of what it computes."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -1.0, 0.5], dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, context=None) -> Tensor:
        return self.weight * x if mask is None else self.weight * x * mask + (context is not None)


@checker
def check_forward(forward) -> str:
    """forward(self, x [B, T, d], *rest) -> [B, T, d]: the frozen block and its steering vector."""

    class Steered(Wrapper):
        def __init__(self, dtype: torch.dtype):
            super().__init__(_Block(dtype))
            self.vector = nn.Parameter(torch.tensor([0.25, 0.5, -1.0]))

    steered, generator = Steered(torch.float32), torch.Generator().manual_seed(0)
    x, vector = torch.randn(2, 4, 3, generator=generator), steered.vector.detach()
    expected = steered.base(x) + vector
    hints = {
        "the vector is added to what the block reads; it belongs to what the block gives": steered.base(x + vector),
        "the frozen block's own output is missing": x + vector,
        "the vector is missing": steered.base(x),
        "the frozen block is added twice: a block gives the residual stream already": x + expected,
        "the vector multiplies; a steering vector is added": steered.base(x) * vector,
    }
    same(called(forward, steered, x), expected, hints, "the output")
    mask, context = torch.tensor([[[1.0], [1.0], [0.0], [1.0]]]), object()
    ignored = {"the block takes more than x: hand it all the other arguments as well": expected}
    same(called(forward, steered, x, mask, context), steered.base(x, mask, context) + vector, ignored, "with a mask")
    hint = {"it adds the vector although self.enabled is False: `disabled` would not give the base": expected}
    with switched_off(steered):
        got, masked = called(forward, steered, x), called(forward, steered, x, mask, context)
    same(got, steered.base(x), hint, "the output while disabled")
    require(torch.equal(got, steered.base(x)), "while disabled it must be the base's output, bit for bit")
    hint = {"while disabled, too, the block needs all its other arguments": steered.base(x)}
    same(masked, steered.base(x, mask, context), hint, "with a mask, while disabled")
    half = called(forward, Steered(torch.bfloat16), x.bfloat16())
    require(
        half.dtype == torch.bfloat16,
        "round a block in half precision it gives float32, which the next layer refuses; cast what is added to y.dtype",
    )
    return "block(x, …) + vector, in the block's precision, and the block alone while disabled."


@checker
def check_vera_parameters(vera_parameters) -> str:
    """vera_parameters(rank, n_layers, d_model, d_ff): what VeRA trains on the six linear layers of every block."""
    for rank, layers, d, d_ff in ((128, 4, 128, 512), (7, 3, 20, 50)):
        config = TransformerConfig(vocab_size=9, max_len=9, d_model=d, n_heads=4, n_layers=layers, d_ff=d_ff)
        expected = layers * (6 * rank + 5 * d + d_ff)
        lora = expected_parameters(config, LoRA(rank=min(rank, d), targets=ALL_LINEARS))
        hints = {
            "every block has its vectors": expected / layers,
            "that is LoRA: A and B are frozen here, only d and b are trained": lora,
            "A and B are frozen; they do not count": expected + lora,
            "feedforward.up has d_ff outputs, so its b has d_ff": layers * 6 * (rank + d),
            "each layer has a d of its own: r values for each of the six": layers * (rank + 5 * d + d_ff),
            "b is missing: as many values as the layer has outputs": layers * 6 * rank,
            "d is missing: r values for each layer": layers * (5 * d + d_ff),
            "that is query and value only": layers * 2 * (rank + d),
        }
        got = called(vera_parameters, rank, layers, d, d_ff)
        same(got, expected, hints, f"the count for r={rank}, {layers} layers, {d} wide, FFN {d_ff}")
    return "r + d_out for each map, summed over six maps and all blocks."


@checker
def check_gated_start(gated_start) -> str:
    """gated_start(d, generator) -> gate [d], vector [d]: y + sigmoid(gate) * vector is y, and both can learn."""
    result = given(called(gated_start, 12, torch.Generator().manual_seed(0)))
    require(isinstance(result, tuple) and len(result) == 2, "return two tensors, gate and vector")
    for name, tensor in zip(("gate", "vector"), result, strict=True):
        given(tensor)
        require(isinstance(tensor, Tensor) and tuple(tensor.shape) == (12,), f"{name} should be a tensor of shape [12]")
        require(bool(torch.isfinite(tensor).all()), f"{name} is not finite, so no step can move it")
    gate, vector = (tensor.detach().float().clone().requires_grad_() for tensor in result)
    opening = torch.sigmoid(gate).detach()
    change = (opening * vector.detach()).abs().max().item()
    require(
        change == 0 or opening.max().item() < 1e-7,  # so far out the next check has more to say
        f"the outputs change by up to {change:.2g}: a sigmoid is small at -6 and never 0; what else can be 0?",
    )
    y, wanted = (torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    optimizer = torch.optim.SGD([gate, vector], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ((y + torch.sigmoid(gate) * vector - wanted) ** 2).mean(dim=0).sum().backward()
        optimizer.step()
    require(
        vector.grad.norm().item() > 1e-6,
        "nothing changes at the start, nor ever: where the gate is closed, no gradient gets through to the vector",
    )
    require(
        gate.grad.norm().item() > 1e-6,
        "the vector learns, but the gate does not: so far out the sigmoid is flat; start it where it has a slope",
    )
    return "the vector is 0 and learns first; the gate follows, since the sigmoid has a slope there."

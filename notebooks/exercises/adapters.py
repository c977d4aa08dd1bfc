"""Checkers of notebook 05."""

import torch
import torch.nn.functional as F

from exercises.verdict import called, checker, given, require, same
from minitransformer import TransformerConfig
from peft import BottleneckAdapter, expected_parameters


@checker
def check_adapter(adapter) -> str:
    """adapter(h [..., d], down_weight [m, d], down_bias [m], up_weight [d, m], up_bias [d]) -> [..., d], with relu."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6), (3, 6), (3,), (6, 3), (6,))
    h, down, down_bias, up, up_bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    inner = F.linear(h, down, down_bias)
    expected = h + F.linear(F.relu(inner), up, up_bias)
    hints = {
        "the skip connection is missing: an adapter adds to h": expected - h,
        "without the non-linearity two linear layers are one: that is a LoRA": h + F.linear(inner, up, up_bias),
        "the non-linearity comes last; it belongs into the bottleneck": h + F.relu(F.linear(inner, up, up_bias)),
        "the biases are missing": h + F.relu(h @ down.T) @ up.T,
        "the non-linearity is applied to h": h + F.linear(F.linear(F.relu(h), down, down_bias), up, up_bias),
    }
    same(called(adapter, h, down, down_bias, up, up_bias), expected, hints, "the output")
    return "h + W_up relu(W_down h + b_down) + b_up."


@checker
def check_adapter_parameters(adapter_parameters) -> str:
    """adapter_parameters(placement, m, n_layers, d_model, d_ff): how many parameters are trained."""
    for layers, d, d_ff, m in ((4, 128, 512, 8), (3, 20, 40, 5)):
        config = TransformerConfig(vocab_size=9, max_len=9, d_model=d, n_heads=4, n_layers=layers, d_ff=d_ff)
        at_width_d = 2 * m * d + m + d
        for placement in ("houlsby", "pfeiffer", "parallel", "inside_ffn"):
            expected = expected_parameters(config, BottleneckAdapter(bottleneck=m, placement=placement))
            adapters, width = 1 + (placement == "houlsby"), d_ff if placement == "inside_ffn" else d
            hints = {
                "every block has an adapter": expected / layers,
                "the biases are missing: m in the bottleneck, and one for each output": expected
                - layers * adapters * (m + width),
                "houlsby, and no other, puts two adapters into each block": layers * at_width_d * (3 - adapters),
            }
            if placement == "inside_ffn":
                hints["inside the FFN the hidden states have d_ff dimensions, not d_model"] = layers * at_width_d
            got = called(adapter_parameters, placement, m, layers, d, d_ff)
            same(got, expected, hints, f'the count of "{placement}" for m={m}, {layers} layers, {d} wide, FFN {d_ff}')
    return "the same as the closed form of the recipe, in all four places."


@checker
def check_near_identity(near_identity) -> str:
    """near_identity(m, d) -> down_weight, down_bias, up_weight, up_bias: a start that changes nothing and can learn."""
    result = called(near_identity, 4, 10)
    require(isinstance(result, tuple) and len(result) == 4, "return down_weight, down_bias, up_weight, up_bias")
    names = ("down_weight", "down_bias", "up_weight", "up_bias")
    for name, tensor, shape in zip(names, result, ((4, 10), (4,), (10, 4), (10,)), strict=True):
        given(tensor)
        require(tuple(tensor.shape) == shape, f"{name} has shape {list(tensor.shape)}, it should be {list(shape)}")
    down, down_bias, up, up_bias = (tensor.detach().double().clone().requires_grad_() for tensor in result)
    h = torch.randn(64, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change = F.linear(F.relu(F.linear(h, down, down_bias)), up, up_bias)
    require(
        float(change.detach().abs().max()) == 0,
        f"it changes h by up to {float(change.detach().abs().max()):.2g}; what must be zero for the output to be zero?",
    )
    (F.linear(F.relu(F.linear(h, down, down_bias)), up, up_bias) * h).sum().backward()
    why = "relu is shut for every input, so no gradient gets through; is down_bias far below 0?"
    if not bool((down != 0).any()):
        why = "with down_weight at zero relu sits at 0, where it has no slope: let up_weight be the zero one"
        if not bool((up != 0).any()):
            why = "with both weights zero, neither gets a gradient; only one of them may be zero"
    require(bool((up.grad != 0).any()), f"nothing will ever be learned: {why}")
    return "nothing changes at the start, and the first step already moves up_weight."

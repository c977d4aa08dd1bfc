import numpy as np
import pytest
import torch
from reference.numpy_transformer import ACTIVATIONS
from reference.random_weights import randomize
from torch import nn

from minitransformer import TransformerConfig
from minitransformer.feedforward import FeedForward, GatedFeedForward, activate


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_agree_with_their_formulas_in_value_and_slope(name):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64) + 0.01
    x.requires_grad_()
    y = activate(x, name)
    (slope,) = torch.autograd.grad(y.sum(), x)
    points, h = x.detach().numpy(), 1e-6
    np.testing.assert_allclose(y.detach(), ACTIVATIONS[name](points), atol=1e-12)
    differences = (ACTIVATIONS[name](points + h) - ACTIVATIONS[name](points - h)) / (2 * h)
    np.testing.assert_allclose(slope, differences, atol=1e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_network_is_two_linear_maps_round_the_activation(name):
    config = TransformerConfig(vocab_size=5, max_len=9, d_model=6, n_heads=1, d_ff=7, activation=name)
    network = randomize(FeedForward(config)).double()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up_w, up_b, down_w, down_b = (p.detach().numpy() for p in network.parameters())
    expected = ACTIVATIONS[name](x.numpy() @ up_w.T + up_b) @ down_w.T + down_b
    np.testing.assert_allclose(network(x).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("bias", ["none", "gate+up+down"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_multiplies_the_hidden_layer(name, bias):
    """Shazeer 2020, equation 6, in value and gradient."""
    changes = {"activation": name, "gated": True, "bias": bias}
    config = TransformerConfig(vocab_size=5, max_len=9, d_model=6, n_heads=1, d_ff=7, **changes)
    network = randomize(GatedFeedForward(config)).double()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in network.named_parameters()}
    gate, up = (x.numpy() @ w[f"{part}.weight"].T + w.get(f"{part}.bias", 0.0) for part in ("gate", "up"))
    expected = (ACTIVATIONS[name](gate) * up) @ w["down.weight"].T + w.get("down.bias", 0.0)
    np.testing.assert_allclose(network(x).detach(), expected, atol=1e-12)
    assert len(w) == (3 if bias == "none" else 6)
    assert torch.autograd.gradcheck(network, x.requires_grad_(), atol=1e-6)


def relu_network():
    config = TransformerConfig(vocab_size=5, max_len=9, d_model=6, n_heads=1, d_ff=7, activation="relu")
    return randomize(FeedForward(config)).double(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)


def test_overwriting_changes_no_gradient():
    network, x = relu_network()
    wanted = [x, *network.parameters()]
    plain = network.down(torch.relu(network.up(x))).square().sum()
    for got, expected in zip(
        torch.autograd.grad(network(x).square().sum(), wanted), torch.autograd.grad(plain, wanted), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of_all", [False, True], ids=["of the map", "of all modules"])
@pytest.mark.parametrize("gradient", [True, False])
def test_what_a_hook_keeps_is_not_overwritten(of_all, gradient):
    network, x = relu_network()
    kept = []
    register = nn.modules.module.register_module_forward_hook if of_all else network.up.register_forward_hook
    handle = register(lambda module, _, out: kept.append(out) if module is network.up else None)
    try:
        with torch.set_grad_enabled(gradient):
            network(x)
    finally:
        handle.remove()
    torch.testing.assert_close(kept[0], network.up(x))
    assert kept[0].min() < 0


def test_a_hook_for_the_gradient_still_gets_it():
    network, x = relu_network()
    seen = []
    network.up.register_full_backward_hook(lambda module, given, received: seen.append(received[0].shape))
    network(x).sum().backward()
    assert seen == [(2, 3, 7)]


def test_a_wrapper_round_the_map_gets_the_rows_as_they_are():
    network, x = relu_network()

    class PerRow(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return torch.arange(1, 3)[:, None, None] * self.base(x)

    expected = network.down(torch.relu(torch.arange(1, 3)[:, None, None] * network.up(x)))
    network.up = PerRow(network.up)
    torch.testing.assert_close(network(x), expected)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation='swish' is unknown; choose one of gelu, gelu_tanh, relu, silu"):
        activate(torch.zeros(1), "swish")

import numpy as np
import pytest
import torch
from reference.numpy_transformer import ACTIVATIONS
from reference.random_weights import randomize

from minitransformer import TransformerConfig
from minitransformer.feedforward import FeedForward, activate


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


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation='silu' is unknown; choose gelu, gelu_tanh or relu"):
        activate(torch.zeros(1), "silu")

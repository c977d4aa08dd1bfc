import numpy as np
import pytest
import torch
from reference.numpy_transformer import layer_norm, rms_norm

from minitransformer import TransformerConfig
from minitransformer.norm import RMSNorm, norm_of

CONFIG = {"vocab_size": 5, "max_len": 9, "d_model": 6, "n_heads": 1, "norm_eps": 0.01}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(x, gain, eps):
    return torch.func.functional_call(RMSNorm(len(gain), eps), {"weight": gain}, x)


def test_rms_norm_agrees_with_its_formula_in_value_and_gradient():
    x, gain = normal(2, 3, 6).requires_grad_(), normal(6, seed=1).requires_grad_()
    y = ours(x, gain, 0.01)
    np.testing.assert_allclose(y.detach(), rms_norm(x.detach().numpy(), gain.detach().numpy(), 0.01), atol=1e-12)
    assert torch.autograd.gradcheck(ours, (x, gain, 0.01))


def test_it_rescales_and_does_not_shift():
    x, gain = normal(4, 6), torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(ours(7 * x, gain, 0.0), ours(x, gain, 0.0))
    assert (ours(x, gain, 0.0).square().mean(dim=-1) - 1).abs().max() < 1e-12
    assert not torch.allclose(ours(x + 1, gain, 0.0), ours(x, gain, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_16_bits_the_mean_is_taken_in_32(dtype):
    x = (300 * normal(3, 6)).to(dtype)  # squares overflow in float16
    y = RMSNorm(6, 1e-5).to(dtype)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), ours(x.float(), torch.ones(6), 1e-5), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("kind, twin", [("layer", layer_norm), ("rms", rms_norm)])
def test_the_config_names_the_norm(kind, twin):
    norm = norm_of(TransformerConfig(**CONFIG, norm_type=kind)).double()
    x = normal(2, 6)
    weights = [p.detach().numpy() for p in norm.parameters()]
    np.testing.assert_allclose(norm(x).detach(), twin(x.numpy(), *weights, 0.01), atol=1e-12)

import numpy as np
import pytest
import torch
from reference.numpy_transformer import NumpyTransformer
from reference.random_weights import randomize

from minitransformer import TransformerConfig
from minitransformer.attention import attention_mask
from minitransformer.block import Block


def block_and_input(**changes):
    sizes = {"vocab_size": 5, "max_len": 6, "d_model": 4, "n_heads": 2, "d_ff": 6, "norm_eps": 0.1}
    config = TransformerConfig(**(sizes | changes))
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return randomize(Block(config)).double(), x, config


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_computes_its_two_equations(norm):
    block, x, config = block_and_input(norm=norm, causal=False)
    weights = {f"block.{name}": p.detach().numpy() for name, p in block.named_parameters()}
    expected = NumpyTransformer(weights, config).block("block", x[1].numpy())
    np.testing.assert_allclose(block(x)[1].detach(), expected, atol=1e-12)


@pytest.mark.parametrize("attention", ["fused", "written_out"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_agree_with_finite_differences(norm, causal, attention):
    block, x, _ = block_and_input(norm=norm, attention=attention, activation="gelu_tanh")
    names, weights = zip(*block.named_parameters(), strict=True)
    mask = attention_mask(3, torch.tensor([[True, True, True], [True, True, False]]), 3, causal)

    def run(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x, mask))

    inputs = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_dropout_falls_on_both_sublayers():
    block, x, _ = block_and_input(dropout=0.999999)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(block.train()(x), x)  # pre-norm: with everything dropped, only the residual stream is left
        assert not torch.equal(block.eval()(x), x)

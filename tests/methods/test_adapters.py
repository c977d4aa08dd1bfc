"""Adapters: each placement equals its formula, written out over the frozen modules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import numpy_peft
from reference.method_cases import RECIPES, train_a_little

import peft
from peft import BottleneckAdapter

PLACEMENTS = ("houlsby", "pfeiffer", "parallel", "inside_ffn")


def bottleneck(adapter, h):
    """The adapter's own tensors through the NumPy twin."""
    tensors = [adapter.tensors()[n].detach().numpy() for n in ("down_weight", "down_bias", "up_weight", "up_bias")]
    recipe = adapter.recipe
    return torch.from_numpy(numpy_peft.bottleneck(h.detach().numpy(), *tensors, recipe.activation, recipe.scale))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_placement_equals_its_formula(tiny, placement, activation):
    model = tiny().double()
    base = tiny().double().blocks[1]
    recipe = BottleneckAdapter(bottleneck=3, placement=placement, activation=activation, scale=2.5)
    train_a_little(peft.attach(model, recipe))
    block = model.blocks[1]
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attended = base.attention(x)
    if placement == "houlsby":
        attended = attended + bottleneck(block.attention, attended)
    if placement == "inside_ffn":
        h = F.gelu(base.feedforward.up(x))
        fed = base.feedforward.down(h + bottleneck(block.feedforward.down, h))
    elif placement == "parallel":
        fed = base.feedforward(x) + bottleneck(block.feedforward, x)
    else:
        h = base.feedforward(x)
        fed = h + bottleneck(block.feedforward, h)
    np.testing.assert_allclose(block.attention(x).detach(), attended.detach(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(block.feedforward(x).detach(), fed.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("placement, per_block", [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1), ("inside_ffn", 1)])
def test_each_block_gets_as_many_adapters_as_the_placement_says(decoder, placement, per_block):
    model = peft.attach(decoder(n_layers=3), BottleneckAdapter(bottleneck=2, placement=placement))
    assert len(peft.state_dict(model)) == 3 * per_block * 4


def test_only_the_upper_half_starts_at_zero(decoder):
    for name, tensor in peft.state_dict(peft.attach(decoder(), RECIPES["houlsby"])).items():
        assert bool((tensor == 0).all()) == (not name.endswith("down_weight")), name
    wide = peft.attach(decoder(d_model=256, n_layers=1), BottleneckAdapter(bottleneck=100, placement="pfeiffer"))
    weight = peft.state_dict(wide)["blocks.0.feedforward.down_weight"]
    assert weight.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_an_adapter_on_wrapped_sublayers_finds_its_width(decoder):
    model = decoder()
    for name in ("lora all", "prefix kv", "houlsby", "inside_ffn"):
        peft.attach(model, RECIPES[name])
    assert model.blocks[0].attention.down_weight.shape == (5, 16)
    assert model.blocks[0].feedforward.base.down.down_weight.shape == (5, 24)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bottleneck": 0}, "bottleneck"),
        ({"placement": "inside"}, "houlsby, pfeiffer, parallel, inside_ffn"),
        ({"activation": "tanh"}, "gelu, gelu_tanh, relu"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(**options)

"""VeRA: the paper's equation and count, and one A and one B for all maps, whatever happens to the model."""

import copy

import numpy as np
import pytest
import torch
from reference import numpy_peft
from reference.method_cases import loss_of, outputs, train_a_little

import peft
from minitransformer import TransformerConfig
from peft import ALL_LINEARS, VeRA


def shared(model):
    """The addresses of every A and B."""
    wrappers = [w for at_site in peft.sites.all_wrappers(model).values() for w in at_site]
    return {tensor.data_ptr() for w in wrappers for tensor in (w.A, w.B)}


def test_a_layer_computes_the_equation(decoder):
    model = train_a_little(peft.attach(decoder().double(), VeRA(rank=6, targets=("up",))))
    layer = model.blocks[1].feedforward.up
    x = torch.randn(3, 16, dtype=torch.float64)
    arrays = [tensor.detach().numpy() for tensor in (x, layer.A, layer.B, layer.d, layer.b)]
    frozen = layer.base(x).detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), frozen + numpy_peft.vera_update(*arrays), rtol=1e-11)


def test_maps_of_every_shape_share_one_pair_of_the_largest_sides(decoder):
    model = peft.attach(decoder(), VeRA(rank=6, targets=ALL_LINEARS))
    layer = model.blocks[0].feedforward.down
    assert len(shared(model)) == 2 and layer.A.shape == (6, 24) and layer.B.shape == (24, 6)
    assert [tuple(part.shape) for part in layer.factors()] == [(6, 24), (16, 6), (6,), (16,)]


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda m: m.double(), lambda m: m.to("cpu", torch.bfloat16).float()],
    ids=["copied", "cast", "cast twice"],
)
def test_what_is_shared_stays_shared(decoder, change):
    model = train_a_little(peft.attach(decoder(), VeRA(rank=6, targets=ALL_LINEARS)))
    assert len(shared(change(model))) == 2


def test_the_shared_pair_is_frozen_counted_once_and_written_once(decoder, tmp_path):
    model = train_a_little(peft.attach(decoder(), VeRA(rank=6)))
    names = list(peft.state_dict(model))
    assert sum(name.endswith(".A") for name in names) == sum(name.endswith(".B") for name in names) == 1
    assert {name.rsplit(".", 1)[1] for name in peft.trainable_parameters(model)} == {"d", "b"}
    peft.save(model, tmp_path / "vera")
    twin = peft.load(decoder(), tmp_path / "vera")
    assert torch.equal(outputs(twin), outputs(model)) and len(shared(twin)) == 2


@pytest.mark.parametrize(
    "d_model, n_layers, rank, expected", [(768, 12, 1, 18_456), (768, 12, 256, 24_576), (1024, 24, 256, 61_440)]
)
def test_the_count_is_the_papers(d_model, n_layers, rank, expected):
    """Their table 1, query and value of RoBERTa: 18.4 and 24.5 thousand in the base model, 61.4 in the large one."""
    sizes = {"vocab_size": 50265, "max_len": 514, "d_model": d_model, "n_heads": 1, "n_layers": n_layers, "d_ff": 4096}
    assert peft.expected_parameters(TransformerConfig(**sizes), VeRA(rank=rank)) == expected


def test_merging_gives_the_same_outputs_and_comes_off_bit_for_bit(decoder):
    model = decoder()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    train_a_little(peft.attach(model, VeRA(rank=6, targets=ALL_LINEARS)))
    before = outputs(model)
    torch.testing.assert_close(outputs(peft.merge(model)), before, rtol=1e-4, atol=1e-5)
    layer = model.blocks[0].attention.output
    assert torch.equal(layer.base.weight, weights["blocks.0.attention.output.weight"])
    assert not torch.equal(layer.merged_weight, layer.base.weight)
    plain = peft.detach(peft.unmerge(model))
    assert all(torch.equal(p, weights[name]) for name, p in plain.named_parameters())


def test_only_the_vectors_get_a_gradient(decoder):
    model = train_a_little(peft.attach(decoder(), VeRA(rank=6)))
    loss_of(model).backward()
    for name, p in peft.sites.named_tensors(model).items():
        assert (p.grad is not None and bool(p.grad.any())) == name.endswith((".d", ".b")), name


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"initial_d": 0.0}, {"initial_d": float("inf")}, {"targets": "query"}], ids=str
)
def test_a_recipe_that_cannot_learn_is_refused(unchecked, options):
    with pytest.raises(ValueError):
        VeRA(**options)

"""LoRA: scale, dropout, which factors train, ranks, merging."""

import numpy as np
import pytest
import torch
from reference import numpy_peft
from reference.method_cases import RECIPES, batch, loss_of, outputs, train_a_little
from torch import nn

import peft
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import fit
from minitransformer.training.objectives import Score
from peft import ALL_LINEARS, LoRA
from peft.methods.lora import LoRALinear


def linear(d_in=2, d_out=3):
    layer = nn.Linear(d_in, d_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def wrapped(recipe, layer, A=None, B=None):
    lora = LoRALinear(layer, recipe, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for own, given in ((lora.A, A), (lora.B, B)):
            if given is not None:
                own.copy_(torch.tensor(given))
    return lora


@pytest.mark.parametrize("rank, alpha, expected", [(1, 1.0, 9.0), (1, 4.0, 36.0), (2, 1.0, 4.5), (2, 4.0, 18.0)])
def test_the_scale_is_alpha_over_r(rank, alpha, expected):
    """By hand: A x = 3 in the first row, B (3) = 9, times alpha / r."""
    A, B = torch.zeros(rank, 2), torch.zeros(3, rank)
    A[0], B[0, 0] = torch.tensor([1.0, 2.0]), 3.0
    lora = wrapped(LoRA(rank=rank, alpha=alpha), linear(), A.tolist(), B.tolist())
    assert lora(torch.ones(1, 2)).tolist() == [[expected, 0.0, 0.0]]


def test_wrapped_layer_equals_the_numpy_twin(decoder):
    model = train_a_little(peft.attach(decoder().double(), LoRA(rank=3, alpha=5.0, targets=ALL_LINEARS)))
    for name in ("query", "output"):
        layer = getattr(model.blocks[1].attention, name)
        x = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        A, B, W, b = (t.detach().numpy() for t in (layer.A, layer.B, layer.base.weight, layer.base.bias))
        twin = x.numpy() @ W.T + b + numpy_peft.lora_update(x.numpy(), A, B, 5.0 / 3)
        np.testing.assert_allclose(layer(x).detach().numpy(), twin, rtol=1e-12, atol=1e-12)


def test_dropout_falls_on_single_numbers_of_x_in_training_only():
    """With A = 1 and one hot B the update is the sum of what was kept of x, doubled: never of y, never by row."""
    recipe = LoRA(rank=2, alpha=2.0, dropout=0.5)
    lora = wrapped(recipe, linear(2, 2), [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    x = torch.ones(200, 10, 2)
    assert torch.equal(lora.eval()(x), x)
    torch.manual_seed(0)
    out = lora.train()(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    kept = (out > 0).float()
    assert 0.45 < kept.mean() < 0.55
    patterns = {tuple(row) for row in kept.flatten(1).tolist()}
    assert len(patterns) > 150  # rows differ: not one mask for the batch
    assert abs(torch.corrcoef(kept.reshape(-1, 2).T)[0, 1]) < 0.1  # and neither do columns share one


def test_dropout_leaves_the_frozen_map_alone():
    layer = nn.Linear(4, 3)
    lora = wrapped(LoRA(rank=1, dropout=0.9), layer).train()
    x = torch.randn(50, 4)
    assert torch.equal(lora(x), layer(x))  # B = 0: whatever is dropped, the base sees all of x


@pytest.mark.parametrize("train", [("A", "B"), ("A",), ("B",)])
def test_one_factor_starts_at_zero_and_the_named_ones_train(decoder, train):
    model = peft.attach(decoder(), LoRA(rank=2, train=train))
    trained = peft.trainable_parameters(model)
    for name, tensor in peft.state_dict(model).items():
        factor = name[-1]
        starts_at_zero = factor == ("A" if train == ("A",) else "B")
        assert bool((tensor == 0).all()) == starts_at_zero, name
        assert (name in trained) == (factor in train)
    loss_of(model).backward()
    for name, p in trained.items():  # at step 0 the gradient of A is exactly 0 while B = 0
        assert (p.grad.norm() > 0) == (not (train == ("A", "B") and name.endswith("A"))), name


def test_start_of_A_is_uniform_within_one_over_root_d_in():
    layer = LoRALinear(nn.Linear(400, 100), LoRA(rank=50), torch.Generator().manual_seed(0))
    assert layer.A.abs().max() <= 1 / 20 and layer.A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    layer = LoRALinear(nn.Linear(400, 100), LoRA(rank=25, train=("A",)), torch.Generator().manual_seed(0))
    assert layer.B.abs().max() <= 1 / 5 and layer.B.std().item() == pytest.approx(1 / 5 / 3**0.5, rel=0.05)


def test_layers_that_are_not_square_work_and_have_the_right_shapes(decoder):
    model = peft.attach(decoder(), LoRA(rank=4, targets=("up", "down")))
    shapes = {name.split(".", 2)[2]: tuple(t.shape) for name, t in peft.state_dict(model).items()}
    assert shapes["feedforward.up.A"] == (4, 16) and shapes["feedforward.up.B"] == (24, 4)
    assert shapes["feedforward.down.A"] == (4, 24) and shapes["feedforward.down.B"] == (16, 4)


def test_a_rank_above_the_smaller_side_is_refused(decoder):
    peft.attach(decoder(), LoRA(rank=16, targets=("up",)))
    with pytest.raises(ValueError, match=r"rank 17 exceeds min\(d_in, d_out\) = 16 of blocks.0.feedforward.up"):
        peft.attach(decoder(), LoRA(rank=17, targets=("up",)))
    with pytest.raises(ValueError, match=r"rank 17 exceeds min\(d_in, d_out\) = 16 of the narrowest target"):
        peft.expected_parameters(decoder().config, LoRA(rank=17, targets=("up",)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"train": ()}, "train"),
        ({"train": ("C",)}, "train"),
        ({"train": ("A", "A")}, "train.* each once"),
        ({"train": ("A", "B", "A")}, "train.* each once"),
        ({"targets": ("query", "query")}, "targets.* each once"),
        ({"targets": "query"}, "tuple"),
        ({"train": "A"}, "tuple"),
    ],
)
def test_bad_options_are_refused(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_no_target_is_refused(decoder):
    with pytest.raises(ValueError, match="no target is given"):
        peft.attach(decoder(), LoRA(rank=2, targets=()))


def test_lists_are_taken_as_tuples_so_that_a_saved_recipe_equals_its_original(unchecked, decoder, tmp_path):
    model = peft.attach(decoder(), LoRA(rank=2, targets=["query"], train=["A", "B"]))
    peft.save(model, tmp_path / "lora.safetensors")
    peft.load(model, tmp_path / "lora.safetensors")


# Merging


@pytest.fixture
def trained(tiny):
    return train_a_little(peft.attach(tiny(), LoRA(rank=3, alpha=8.0, targets=ALL_LINEARS)))


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_merged_equals_unmerged_with_nonzero_B_and_unmerging_is_bit_exact(trained):
    before, weights = outputs(trained), weights_of(trained)
    for _ in range(20):
        peft.merge(trained)
        torch.testing.assert_close(outputs(trained), before, rtol=1e-4, atol=1e-5)
        peft.unmerge(trained)
    assert torch.equal(outputs(trained), before)
    assert all(torch.equal(p, weights[name]) for name, p in trained.named_parameters())


def test_the_merged_weight_is_w0_plus_scale_b_a_and_w0_stays_where_it_is(decoder):
    model = train_a_little(peft.attach(decoder().double(), LoRA(rank=2, alpha=3.0)))
    layer, x = model.blocks[0].attention.query, torch.eye(16, dtype=torch.float64)
    frozen = layer.base.weight.detach().clone()
    expected = frozen.numpy() + numpy_peft.lora_weight(layer.A.detach().numpy(), layer.B.detach().numpy(), 1.5)
    peft.merge(model)
    np.testing.assert_allclose(layer.merged_weight.numpy(), expected, rtol=1e-13)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.merged_weight, layer.base.bias))
    assert torch.equal(layer.base.weight, frozen) and "merged" in repr(layer)


def test_disabled_while_merged_gives_the_base_and_then_the_merged_again(tiny):
    model = tiny()
    base = outputs(model)
    peft.merge(train_a_little(peft.attach(model, RECIPES["lora all"])))
    merged = outputs(model)
    with peft.disabled(model):
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), merged) and not torch.equal(merged, base)


def test_detaching_while_merged_restores_w0(tiny):
    model = tiny()
    base, weights = outputs(model), weights_of(model)
    peft.detach(peft.merge(train_a_little(peft.attach(model, RECIPES["lora all"]))))
    assert torch.equal(outputs(model), base)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_train_and_eval_leave_a_merged_model_alone(trained):
    peft.merge(trained)
    merged = outputs(trained)
    assert torch.equal(outputs(trained.train()), merged) and torch.equal(outputs(trained.eval()), merged)


def test_a_file_saved_while_merged_holds_the_factors_and_loads_merged(trained, tiny, tmp_path):
    peft.save(trained, tmp_path / "unmerged")
    peft.save(peft.merge(trained), tmp_path / "merged")
    merged, before = outputs(trained), weights_of(trained)
    described = [peft.describe(tmp_path / name) for name in ("unmerged", "merged")]
    assert [d.merged for d in described] == [False, True]
    assert described[0].tensors == described[1].tensors and "while merged" in str(described[1])
    with pytest.raises(ValueError, match="unmerge"):
        peft.load(trained, tmp_path / "merged")
    assert all(torch.equal(p, before[name]) for name, p in trained.named_parameters())
    again = peft.load(tiny(), tmp_path / "merged")
    assert torch.equal(outputs(again), merged) and "merged" in str(again)
    peft.unmerge(again)
    assert torch.equal(outputs(again), outputs(peft.load(tiny(), tmp_path / "unmerged")))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_factor_is_not_merged_and_no_weight_changes(trained, broken):
    with torch.no_grad():
        trained.blocks[1].feedforward.down.B[0, 0] = broken  # the last site: the others must not be merged either
    before = weights_of(trained)
    with pytest.raises(ValueError, match=r"blocks.1.feedforward.down holds a NaN"):
        peft.merge(trained)
    after = weights_of(trained)
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
    with pytest.raises(ValueError, match="nothing is merged"):
        peft.unmerge(trained)


def test_merging_twice_unmerging_twice_and_merging_without_lora_are_refused(trained, decoder):
    peft.merge(trained)
    with pytest.raises(ValueError, match="merged already"):
        peft.merge(trained)
    peft.unmerge(trained)
    with pytest.raises(ValueError, match="nothing is merged"):
        peft.unmerge(trained)
    for model in (decoder(), peft.attach(decoder(), RECIPES["houlsby"])):
        for operation, message in ((peft.merge, "no LoRA"), (peft.unmerge, "nothing is merged")):
            with pytest.raises(ValueError, match=message):
                operation(model)


def test_merging_beside_other_methods_keeps_the_outputs(tiny):
    model = tiny()
    for name in ("lora all", "houlsby", "inside_ffn", "prefix hidden"):
        peft.attach(model, RECIPES[name])
    before = outputs(train_a_little(model))
    torch.testing.assert_close(outputs(peft.merge(model)), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs(peft.unmerge(model)), before)


def test_training_while_merged_is_refused_by_fit_audit_and_any_backward_pass(trained):
    """Also where something else learns beside it: the merged weight would not follow A and B."""
    peft.merge(peft.attach(trained, RECIPES["prefix kv"]))
    before = peft.state_dict(trained)
    data = Dataset(*batch(), torch.zeros(3, dtype=torch.int64))
    for training in (
        lambda: loss_of(trained).backward(),
        lambda: peft.gradient_audit(trained, loss_of),
        lambda: fit(trained, data, steps=1, objective=lambda model, _: Score(loss_of(model), 1, 1), progress=False),
    ):
        with pytest.raises(ValueError, match=r"unmerge\(model\) first"):
            training()
    assert all(torch.equal(tensor, before[name]) for name, tensor in peft.state_dict(trained).items())

"""Rank-stabilised LoRA, DoRA, LoRA+, the sum of several LoRAs, and copies with the update in their weights."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from reference import numpy_peft
from reference.method_cases import RECIPES, batch, loss_of, outputs, train_a_little

import peft
from minitransformer.heads import SequenceClassifier
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import fit, next_token_loss
from peft import ALL_LINEARS, DoRA, LoRA, combine, lora_plus_groups, merged_copy


def test_the_rank_stabilised_scale_is_alpha_over_the_root_of_r():
    assert LoRA(rank=16, alpha=8, rank_stabilized=True).scale == 2.0
    assert LoRA(rank=16, alpha=8).scale == 0.5


def test_rank_stabilised_updates_do_not_shrink_with_the_rank():
    """Kalajdzievski 2023, theorem 3.2: one step of the same rate moves the output by as much at every rank."""
    moved = dict.fromkeys([(stabilized, rank) for stabilized in (False, True) for rank in (4, 64)], 0.0)
    for (stabilized, rank), seed in itertools.product(moved, range(30)):
        generator = torch.Generator().manual_seed(1000 + seed)
        linear, x = torch.nn.Linear(256, 256), torch.randn(1, 256, generator=generator)
        recipe = LoRA(rank=rank, alpha=8.0, targets=("map",), rank_stabilized=stabilized)
        model = peft.attach(torch.nn.ModuleDict({"map": linear}), recipe, seed=seed)
        before = model["map"](x).detach()
        model["map"](x).sum().backward()
        with torch.no_grad():
            model["map"].B.sub_(model["map"].B.grad)
        moved[stabilized, rank] += (model["map"](x) - before).norm().item()
    assert moved[False, 64] == pytest.approx(moved[False, 4] / 16, rel=0.2)  # as 1 / r
    assert moved[True, 64] == pytest.approx(moved[True, 4], rel=0.2)


# DoRA


@pytest.fixture
def dora(decoder):
    return train_a_little(peft.attach(decoder().double(), DoRA(rank=2, alpha=3.0, targets=ALL_LINEARS)))


def test_dora_equals_the_numpy_twin(dora):
    layer = dora.blocks[1].feedforward.up
    tensors = (layer.base.weight, layer.base.bias, layer.A, layer.B, layer.magnitude)
    W0, b, A, B, m = (tensor.detach().numpy() for tensor in tensors)
    weight = W0 + 1.5 * B @ A
    weight = m[:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)
    x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() @ weight.T + b, rtol=1e-12, atol=1e-13)
    twin = numpy_peft.dora_weight(W0, A, B, m, 1.5, np.linalg.norm(W0 + 1.5 * B @ A, axis=1))
    np.testing.assert_allclose(layer.changed_weight().detach().numpy(), twin, rtol=1e-12)


def test_the_magnitude_is_the_length_of_each_row(dora):
    layer = dora.blocks[0].attention.query
    torch.testing.assert_close(peft.functional.row_norms(layer.changed_weight()), layer.magnitude.abs())


def test_the_gradient_of_dora_takes_the_norm_as_a_constant(dora):
    """Through y = factor * (W0 x + s B A x) + b with the factor's norm held fixed: the same gradients."""
    layer = dora.blocks[0].attention.value
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tensors = [layer.A, layer.B, layer.magnitude]
    ours = torch.autograd.grad((layer(x) * weights).sum(), tensors)
    by_weight = x @ layer.changed_weight().T + layer.base.bias
    theirs = torch.autograd.grad((by_weight * weights).sum(), tensors)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_dropout_of_dora_falls_on_the_update_only(decoder):
    model = peft.attach(decoder(), DoRA(rank=2, dropout=0.9)).train()
    assert torch.equal(outputs(model), outputs(decoder()))  # B = 0: nothing is dropped that counts
    layer, x = train_a_little(model).blocks[0].attention.query, torch.ones(200, 16)
    assert not torch.allclose(layer(x)[0], layer(x)[1])
    torch.testing.assert_close(model.eval().blocks[0].attention.query(x)[0], layer(x)[1])


def test_a_row_of_zeros_has_no_direction(decoder):
    model = decoder()
    with torch.no_grad():
        model.blocks[1].attention.query.weight[3] = 0.0
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.query has a row of zeros"):
        peft.attach(model, DoRA(rank=2))
    assert peft.attached(model) == []


def test_dora_and_lora_do_not_share_a_place(decoder):
    model = peft.attach(decoder(), LoRA(rank=2))
    with pytest.raises(ValueError, match="carries a LoRALinear already"):
        peft.attach(model, DoRA(rank=2))


# Merging


MERGEABLE = ("lora", "lora all", "lora rank-stabilised", "lora layer 1", "dora")
every_mergeable = pytest.mark.parametrize("recipe", [RECIPES[name] for name in MERGEABLE], ids=MERGEABLE)


@every_mergeable
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_merged_equals_apart_and_a_hundred_cycles_leave_no_trace(decoder, recipe, dtype):
    model = train_a_little(peft.attach(decoder().to(dtype), recipe), size=0.1)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    apart = outputs(model)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]  # bfloat16 has 8 bits: 2^-8 per rounding
    for _ in range(100):
        peft.merge(model)
        peft.unmerge(model)
    peft.merge(model)
    torch.testing.assert_close(outputs(model), apart, rtol=tolerance, atol=tolerance)
    peft.unmerge(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(outputs(model), apart)


@every_mergeable
def test_a_merged_model_says_so_and_disabled_gives_the_base(tiny, recipe):
    model = tiny()
    base = outputs(model)
    train_a_little(peft.attach(model, recipe))
    assert "merged" not in str(model) and "merged" not in str(peft.parameter_table(model))
    peft.merge(model)
    assert "merged" in str(model) and "merged" in str(peft.parameter_table(model))
    with peft.disabled(model):
        assert torch.equal(outputs(model), base)


@every_mergeable
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_tensor_is_not_merged_even_where_it_has_no_effect_yet(tiny, recipe, value):
    """A NaN in A beside a B of zeros: 0 * NaN is NaN, but an infinity in one row of A may cancel nowhere either."""
    model = peft.attach(tiny(), recipe)
    layer = model.blocks[1].attention.value
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for tensor in layer.tensors().values():
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] = value
        with pytest.raises(ValueError, match=r"blocks\.1\.attention\.value holds a NaN or an infinity"):
            peft.merge(model)
        with torch.no_grad():
            tensor.copy_(kept)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@every_mergeable
@pytest.mark.parametrize("first", ["apart", "merged"])
def test_a_merged_copy_is_a_plain_model(tiny, recipe, first):
    model, plain = tiny(), tiny()
    train_a_little(peft.attach(model, recipe))
    if first == "merged":
        peft.merge(model)
    before, names = outputs(model), str(model)
    twin = merged_copy(model)
    assert twin.state_dict().keys() == plain.state_dict().keys() and str(twin) == str(plain)
    assert vars(twin).keys() == vars(plain).keys()
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in plain.named_parameters()
    }
    torch.testing.assert_close(outputs(twin), before, rtol=1e-5, atol=1e-5)
    plain.load_state_dict(twin.state_dict())
    assert torch.equal(outputs(plain), outputs(twin))
    assert torch.equal(outputs(model), before) and str(model) == names
    peft.attach(twin, LoRA(rank=1))


def test_a_merged_copy_of_a_model_without_methods_is_refused(decoder):
    with pytest.raises(ValueError, match="no LoRA"):
        merged_copy(decoder())


def test_a_merged_copy_takes_a_trained_head_along(tiny):
    model = SequenceClassifier(tiny(lm_head="none"), n_classes=3)
    train_a_little(peft.attach(model, LoRA(rank=2), train_also=("head",)))
    tokens, mask = batch()
    twin = merged_copy(model)
    assert torch.equal(twin.head.weight, model.head.weight)
    torch.testing.assert_close(twin(tokens, mask), model(tokens, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prefix kv", "houlsby", "prompt", "bitfit", "ia3"])
def test_what_is_no_change_of_a_weight_cannot_be_in_a_merged_copy(tiny, name):
    model = tiny()
    with pytest.raises(ValueError, match="is attached as well, which is no change of a weight"):
        merged_copy(peft.attach(copy.deepcopy(model), RECIPES[name]))
    both = peft.attach(peft.attach(model, RECIPES["lora"]), RECIPES[name])
    with pytest.raises(ValueError, match="is attached as well, which is no change of a weight"):
        merged_copy(both)


# LoRA+


def test_lora_plus_gives_every_b_a_rate_of_its_own(decoder):
    model = peft.attach(peft.attach(decoder(), LoRA(rank=2)), RECIPES["houlsby"])
    slow, fast = lora_plus_groups(model, 1e-3, ratio=8.0)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    b = {id(p) for name, p in peft.trainable_parameters(model).items() if name.endswith(".B")}
    assert {id(p) for p in fast["params"]} == b
    assert {id(p) for p in slow["params"]} == {id(p) for p in peft.trainable_parameters(model).values()} - b
    slow, fast = lora_plus_groups(model, 1e-3)
    assert fast["lr"] == 16 * slow["lr"]  # the ratio that the paper takes from its experiments


def test_lora_plus_with_plain_gradient_descent_moves_b_by_ratio_times_the_gradient(decoder):
    model = train_a_little(peft.attach(decoder(), LoRA(rank=2)))
    loss_of(model).backward()
    before = peft.state_dict(model)
    gradients = {name: p.grad.clone() for name, p in peft.trainable_parameters(model).items()}
    torch.optim.SGD(lora_plus_groups(model, 0.1, ratio=5.0)).step()
    for name, p in peft.trainable_parameters(model).items():
        rate = 0.5 if name.endswith(".B") else 0.1
        torch.testing.assert_close(p.detach(), before[name] - rate * gradients[name])


def test_fit_keeps_the_ratio_through_the_schedule(decoder):
    model, (tokens, mask) = peft.attach(decoder(), LoRA(rank=2)), batch()
    optimizer = torch.optim.AdamW(lora_plus_groups(model, 1e-3, ratio=8.0), weight_decay=0.0)
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    optimizer.__class__ = Spy
    data = Dataset(tokens, mask, torch.zeros(3, dtype=torch.int64))
    fit(model, data, steps=6, optimizer=optimizer, objective=next_token_loss, progress=False, warmup=2)
    assert len(seen) == 6 and all(fast == pytest.approx(8 * slow) for slow, fast in seen)
    assert seen[0][0] < seen[2][0] > seen[5][0]


@pytest.mark.parametrize("recipe", [RECIPES["houlsby"], RECIPES["lora A"]], ids=["houlsby", "lora A"])
def test_lora_plus_without_a_trained_b_is_refused(decoder, recipe):
    with pytest.raises(ValueError, match="trains no B"):
        lora_plus_groups(peft.attach(decoder(), recipe), 1e-3)
    with pytest.raises(ValueError, match="must be above 0"):
        lora_plus_groups(peft.attach(decoder(), LoRA(rank=2)), 1e-3, ratio=0.0)


# Combining


def two_loras(tiny):
    first = train_a_little(peft.attach(tiny(), LoRA(rank=2, alpha=3.0)), seed=1)
    second = train_a_little(peft.attach(tiny(), LoRA(rank=3, alpha=8.0, targets=("value", "up"))), seed=2)
    return first, second


def delta(model, site):
    """ΔW of the LoRA at that place, in NumPy."""
    layer = model.get_submodule(site)
    if not isinstance(layer, peft.Wrapper):
        return np.zeros(tuple(layer.weight.shape))
    A, B = layer.A.detach().double().numpy(), layer.B.detach().double().numpy()
    return layer.recipe.scale * B @ A


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0), (0.0, 1.0)])
def test_combining_gives_the_weighted_sum_of_the_updates(tiny, weights):
    first, second = two_loras(tiny)
    recipe, tensors = combine([first, second], weights)
    assert (recipe.rank, recipe.scale) == (5, 1.0)
    both = peft.attach(tiny(), recipe)
    peft.load_state_dict(both, tensors)
    for layer in (0, 1):
        for place in ("attention.query", "attention.value", "feedforward.up"):
            site = f"blocks.{layer}.{place}"
            expected = weights[0] * delta(first, site) + weights[1] * delta(second, site)
            np.testing.assert_allclose(delta(both, site), expected, rtol=1e-5, atol=1e-6)


def test_one_weight_of_one_gives_back_the_same_model(tiny):
    first, _ = two_loras(tiny)
    recipe, tensors = combine([first], [1.0])
    assert all(torch.equal(tensors[name], A) for name, A in peft.state_dict(first).items() if name.endswith(".A"))
    again = peft.attach(tiny(), recipe)
    peft.load_state_dict(again, tensors)
    torch.testing.assert_close(outputs(again), outputs(first), rtol=1e-5, atol=1e-5)


def test_averaging_the_factors_instead_has_cross_terms():
    generator = torch.Generator().manual_seed(0)
    A1, A2 = (torch.randn(4, 32, generator=generator) for _ in range(2))
    B1, B2 = (torch.randn(32, 4, generator=generator) for _ in range(2))
    true = (B1 @ A1 + B2 @ A2) / 2
    averaged = ((B1 + B2) / 2) @ ((A1 + A2) / 2)
    cross = (B1 @ A2 + B2 @ A1) / 4
    torch.testing.assert_close(averaged, true / 2 + cross)
    assert (averaged - true).norm() > 0.5 * true.norm()


def test_files_models_and_state_dicts_can_be_combined(tiny, tmp_path):
    first, second = two_loras(tiny)
    peft.save(first, tmp_path / "first")
    mixed = combine([tmp_path / "first", (peft.attached(second)[0].method, peft.state_dict(second))], [1.0, 2.0])
    recipe, tensors = combine([first, second], [1.0, 2.0])
    assert mixed[0] == recipe and all(torch.equal(mixed[1][name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("make", "weights", "message"),
    [
        (lambda a, b: [], [], "at least one LoRA"),
        (lambda a, b: [a, b], [1.0], "one weight for each"),
        (lambda a, b: [a, b], [1.0, math.nan], "finite"),
        (lambda a, b: [a, peft.attach(peft.detach(b), RECIPES["houlsby"])], [1.0, 1.0], "single plain LoRA"),
        (lambda a, b: [a, peft.attach(peft.detach(b), RECIPES["dora"])], [1.0, 1.0], "single plain LoRA"),
        (lambda a, b: [a, peft.attach(b, RECIPES["houlsby"])], [1.0, 1.0], "this one holds LoRA, BottleneckAdapter"),
    ],
)
def test_what_cannot_be_combined_is_refused(tiny, make, weights, message):
    with pytest.raises(ValueError, match=message):
        combine(make(*two_loras(tiny)), weights)


def test_loras_of_models_of_different_shapes_are_refused(tiny):
    first, _ = two_loras(tiny)
    wider = peft.attach(tiny(d_model=32), LoRA(rank=2))
    with pytest.raises(ValueError, match="belong to different models"):
        combine([first, wider], [1.0, 1.0])
    of_unknown_base = [(peft.attached(model)[0].method, peft.state_dict(model)) for model in (first, wider)]
    with pytest.raises(ValueError, match=r"has the shapes \[\(16, 16\), \(32, 32\)\]: these LoRAs belong to different"):
        combine(of_unknown_base, [1.0, 1.0])


def attached_sum(build, combined):
    recipe, tensors = combined
    both = peft.attach(build(), recipe)
    peft.load_state_dict(both, tensors)
    return both


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_lower_rank_gives_the_nearest_update_and_says_how_near(tiny, rank):
    """Eckart-Young: what is missing has the singular values from the k-th on, as NumPy finds them in the sum itself."""
    loras, weights = two_loras(tiny), (0.5, -2.0)
    whole = attached_sum(tiny, combine(loras, weights))
    cut = combine(loras, weights, rank=rank)
    assert (cut[0].rank, cut[0].scale) == (rank, 1.0)
    near = attached_sum(tiny, cut)
    for site, error in cut.error.items():
        U, S, Vh = np.linalg.svd(delta(whole, site))
        np.testing.assert_allclose(delta(near, site), (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-4, atol=1e-5)
        missing = np.linalg.norm(delta(near, site) - delta(whole, site)) / np.linalg.norm(delta(whole, site))
        assert error == pytest.approx(missing, abs=1e-6)
    assert set(combine(loras, weights).error.values()) == {0.0}
    assert len(cut.error) == 6 and max(cut.error.values()) > 0.01


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, -3.0, 0.5)])
def test_ranks_above_the_width_are_compressed_without_loss(decoder, weights):
    recipes = [LoRA(rank=9, alpha=4.0), LoRA(rank=12, alpha=1.0, rank_stabilized=True), LoRA(rank=4, targets=("up",))]
    loras = [train_a_little(peft.attach(decoder(), recipe), seed=i) for i, recipe in enumerate(recipes)]
    combined = combine(loras, weights)
    assert combined[0].rank == 16 and max(combined.error.values()) < 1e-12
    both = attached_sum(decoder, combined)
    for site in combined.error:
        expected = sum(weight * delta(lora, site) for weight, lora in zip(weights, loras, strict=True))
        np.testing.assert_allclose(delta(both, site), expected, rtol=1e-4, atol=1e-5)


def test_an_update_of_nothing_has_no_error(decoder):
    combined = combine([peft.attach(decoder(), LoRA(rank=4))] * 2, [1.0, 1.0], rank=3)
    assert set(combined.error.values()) == {0.0} and not any(combined[1][f"{s}.B"].any() for s in combined.error)


@pytest.mark.parametrize("weights", [(1.0, -1.0, 0.0), (0.1, 0.2, -0.3), (1e6, -3e6, 2e6)])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_a_sum_that_is_zero_is_zero_and_has_no_error(tiny, weights, rank):
    combined = combine([two_loras(tiny)[0]] * 3, weights, rank)
    assert set(combined.error.values()) == {0.0}
    for site in combined.error:
        A, B = (combined[1][f"{site}.{factor}"].double() for factor in "AB")
        assert (B @ A).norm() <= 1e-7 * max(weights) * A.norm()


def test_the_error_is_as_small_as_it_says_beside_a_large_sum_that_cancels(tiny):
    """What is left of 1e6 - 1e6 is the second LoRA, of rank 3."""
    first, second = two_loras(tiny)
    expected, combined = combine([second], [1.0]), combine([first, second, first], [1e6, 1.0, -1e6], rank=3)
    for site, error in expected.error.items():
        made, wanted = (c[1][f"{site}.B"] @ c[1][f"{site}.A"] for c in (combined, expected))
        torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-5)
        assert error == 0.0 and combined.error[site] < 1e-6


@pytest.mark.parametrize("rank, message", [(0, "between 1 and 5"), (6, "between 1 and 5")])
def test_a_rank_that_the_sum_does_not_have_is_refused(tiny, rank, message):
    with pytest.raises(ValueError, match=message):
        combine(two_loras(tiny), [1.0, 1.0], rank=rank)


def narrow_and_wide(seed):
    model = torch.nn.ModuleDict({"wide": torch.nn.Linear(8, 8), "narrow": torch.nn.Linear(8, 3)})
    model.load_state_dict({name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()})
    return train_a_little(peft.attach(model, LoRA(rank=3, targets=("wide", "narrow")), seed=seed), seed=seed)


def test_a_layer_without_room_for_the_rank_of_another_is_refused_with_the_rank_that_fits():
    loras = [narrow_and_wide(seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match="has rank 6 in one layer, and another has room for 3 only; rank=3"):
        combine(loras, [1.0, 1.0])
    error = combine(loras, [1.0, 1.0], rank=3).error
    assert error["narrow"] < 1e-6 < error["wide"]


@pytest.mark.parametrize("known", ["model", "file"])
def test_loras_of_other_base_weights_are_refused_where_they_are_known(decoder, tmp_path, known):
    first, other = (peft.attach(decoder(seed=seed), LoRA(rank=2)) for seed in (0, 1))
    peft.save(other, tmp_path / "other")
    given = {"model": other, "file": tmp_path / "other"}[known]
    with pytest.raises(ValueError, match="belong to different models: they were trained on base weights that differ"):
        combine([first, given], [1.0, 1.0])
    combine([first, (peft.attached(other)[0].method, peft.state_dict(other))], [1.0, 1.0])  # nobody can know


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda recipe, t: (LoRA(rank=3), t), "no factor of rank 3"),
        (
            lambda recipe, t: (recipe, {**t, "x.A": torch.full((2, 4), math.nan), "x.B": torch.ones(4, 2)}),
            "x.A is missing, not finite",
        ),
        (lambda recipe, t: (recipe, {**t, "x.A": torch.ones(2, 4)}), "x.B is missing"),
        (lambda recipe, t: (recipe, {**t, "x.bias": torch.ones(2, 4)}), "x.A is missing"),
    ],
)
def test_tensors_that_are_not_those_of_the_recipe_are_refused(decoder, change, message):
    model = peft.attach(decoder(), LoRA(rank=2))
    with pytest.raises(ValueError, match=message):
        combine([change(peft.attached(model)[0].method, peft.state_dict(model))], [1.0])


# Layers


@pytest.mark.parametrize(
    ("layers", "message"),
    [((), "at least one block"), ((1, 1), "each once"), ((-1,), "counted from 0"), ((0, 2), "there are 0, 1")],
)
@pytest.mark.parametrize("kind", [LoRA, DoRA, peft.PrefixTuning, peft.BottleneckAdapter, peft.BitFit, peft.IA3])
def test_bad_layers_are_refused(decoder, kind, layers, message):
    with pytest.raises(ValueError, match=message):
        peft.attach(decoder(), kind(layers=layers))


@pytest.mark.parametrize("kind", [LoRA, DoRA, peft.PrefixTuning, peft.BottleneckAdapter, peft.BitFit, peft.IA3])
def test_layers_are_entered_and_counted_and_no_others(decoder, kind):
    model = peft.attach(decoder(n_layers=3), kind(layers=(2, 0)))
    names = peft.trainable_parameters(model)
    assert {name.split(".")[1] for name in names} == {"0", "2"}
    recipe = peft.attached(model)[0].method
    assert recipe.layers == (2, 0)
    assert peft.parameter_table(model).trained == peft.expected_parameters(model.config, recipe)
    with pytest.raises(ValueError, match="block"):
        peft.expected_parameters(decoder().config, recipe)

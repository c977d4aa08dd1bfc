"""A prefix is concatenated K and V: equal to two other forms of it, and blind to padding, batches and caches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import numpy_peft
from reference.method_cases import RECIPES, batch, outputs, train_a_little

import peft
from minitransformer.attention import attention_mask, recorded
from minitransformer.cache import KVCache
from peft import PrefixTuning, functional

PREFIXES = {name: recipe for name, recipe in RECIPES.items() if name.startswith("prefix")}
every_prefix = pytest.mark.parametrize("recipe", PREFIXES.values(), ids=PREFIXES.keys())
PLAIN = {name: recipe for name, recipe in PREFIXES.items() if not recipe.gated}
GATED = {name: recipe for name, recipe in PREFIXES.items() if recipe.gated}
every_plain_prefix = pytest.mark.parametrize("recipe", PLAIN.values(), ids=PLAIN.keys())
every_gated_prefix = pytest.mark.parametrize("recipe", GATED.values(), ids=GATED.keys())


def pad(tokens, n, side):
    """Tokens [B, T] -> [B, T + n], the mask, and the columns of the real ones."""
    filler = torch.full((len(tokens), n), 7)
    parts = [(filler, False), (tokens, True)]
    parts = parts if side == "left" else parts[::-1]
    mask = torch.cat([torch.full_like(part, real, dtype=torch.bool) for part, real in parts], dim=1)
    return torch.cat([part for part, _ in parts], dim=1), mask


@every_plain_prefix
def test_wrapped_attention_equals_concatenation_by_hand_and_the_gated_form(tiny, recipe):
    model = train_a_little(peft.attach(tiny().double(), recipe))
    wrapper = model.blocks[1].attention
    base = wrapper.base
    x = torch.randn(3, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = attention_mask(6, batch()[1], 6, model.config.causal)
    heads = [base.split_heads(part(x)) for part in (base.query, base.key, base.value)]
    prefix = [base.split_heads(part.expand(3, -1, -1)) for part in wrapper.prefix()]
    by_concatenation = functional.prefix_attention(*heads, *prefix, mask)
    by_gate, gate = functional.gated_attention(*heads, *prefix, mask)
    in_numpy = numpy_peft.prefix_attention(*(t.detach().numpy() for t in (*heads, *prefix)), mask.numpy())
    ours = wrapper(x, mask)
    for other in (by_concatenation, by_gate, torch.from_numpy(in_numpy)):
        joined = base.output(other.transpose(1, 2).flatten(-2))
        torch.testing.assert_close(ours, joined, rtol=1e-10, atol=1e-12)
    assert 0 < gate.min() < gate.max() < 1


def test_hidden_prefix_passes_through_the_frozen_key_and_value_maps(decoder):
    model = peft.attach(decoder(), RECIPES["prefix hidden normal"])
    wrapper = model.blocks[0].attention
    key, value = wrapper.prefix()
    assert torch.equal(key, wrapper.hidden @ wrapper.base.key.weight.T + wrapper.base.key.bias)
    assert torch.equal(value, wrapper.hidden @ wrapper.base.value.weight.T + wrapper.base.value.bias)


@every_gated_prefix
def test_gated_attention_equals_the_numpy_twin(tiny, recipe):
    model = train_a_little(peft.attach(tiny().double(), recipe), size=0.5)
    wrapper = model.blocks[1].attention
    base = wrapper.base
    x = torch.randn(3, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = attention_mask(6, batch()[1], 6, model.config.causal)
    q = base.split_heads(base.query(x))
    own = base.attend(q, *base.keys_and_values(x), mask)
    prefix = [base.split_heads(part.expand(3, -1, -1)) for part in wrapper.prefix()]
    arrays = [tensor.detach().numpy() for tensor in (own, q, *prefix, wrapper.gate)]
    heads = torch.from_numpy(numpy_peft.gated_prefix(*arrays))
    expected = base.output(heads.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(wrapper(x, mask), expected, rtol=1e-10, atol=1e-12)
    assert wrapper.gate.shape == (2,)


@every_gated_prefix
def test_a_closed_gate_hides_whatever_the_prefix_holds_and_each_head_has_its_own(tiny, recipe):
    model = tiny()
    before = outputs(model)
    train_a_little(peft.attach(model, recipe))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.gate.zero_()
    assert torch.equal(outputs(model), before)
    opened = []
    for head in (0, 1):
        with torch.no_grad():
            model.blocks[0].attention.gate.zero_()[head] = 1.0
        opened.append(outputs(model))
    assert not torch.allclose(opened[0], before) and not torch.allclose(*opened)


@every_plain_prefix
def test_every_query_sees_every_prefix_position(tiny, recipe):
    model = peft.attach(tiny(), recipe)
    tokens, mask = batch()
    with recorded(model) as weights:
        model.hidden(tokens, mask)
    for layer in weights[0 if recipe.layers is None else recipe.layers[0] :]:
        assert layer.shape == (3, 2, 6, 3 + 6)
        assert bool((layer[..., :3] > 0).all())
        torch.testing.assert_close(layer.sum(-1), torch.ones(3, 2, 6))


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, marks=[pytest.mark.slow] if norm == "post" and "prefix" not in name else [])
        for name in RECIPES
        for norm in ("pre", "post")
    ],
)
def test_cached_outputs_equal_uncached_ones_also_behind_left_padding(decoder, name, norm):
    model = train_a_little(peft.attach(decoder(norm=norm, init="unit_embedding"), RECIPES[name]))
    tokens, mask = pad(batch()[0], 2, "left")
    cache, pieces = KVCache(2), []
    with torch.no_grad():
        for begin, end in ((0, 4), (4, 5), (5, 8)):
            pieces.append(model.hidden(tokens[:, begin:end], mask[:, begin:end], cache=cache))
        whole = model.hidden(tokens, mask)
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask], whole[mask], rtol=1e-5, atol=1e-5)
    expected = model.generate(tokens[:, :5], 3, padding_mask=mask[:, :5], use_cache=False)
    assert torch.equal(model.generate(tokens[:, :5], 3, padding_mask=mask[:, :5]), expected)


@every_prefix
def test_positions_of_real_tokens_do_not_move(decoder, recipe):
    model = decoder()
    tokens, real = batch()
    before = model.embedding(tokens, real)
    peft.attach(model, recipe)
    assert torch.equal(model.embedding(tokens, real), before)
    outputs(model, batch(length=12)[0])  # max_len is 12: the prefix takes none of it


def test_start_from_activations_is_what_real_words_give(tiny):
    """Recomputed here with the cache's own keys and values: *a prefix is a learned KV cache*."""
    words = (4, 9, 2)
    for at in ("kv", "hidden"):
        model = tiny(causal=True)
        cache = KVCache(2)
        model.hidden(torch.tensor([words]), cache=cache)
        peft.attach(model, PrefixTuning(length=3, at=at, init_tokens=words))
        for block, layer in zip(model.blocks, cache.layers, strict=True):
            key, value = (part.unflatten(-1, (2, -1)).transpose(0, 1) for part in block.attention.prefix())
            torch.testing.assert_close(key, layer.key[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(value, layer.value[0], rtol=1e-5, atol=1e-6)


def test_start_from_the_normal_distribution_has_the_given_spread(decoder):
    model = peft.attach(decoder(), PrefixTuning(length=200, init="normal", init_std=0.5))
    for tensor in peft.state_dict(model).values():
        assert tensor.shape == (200, 16) and tensor.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_prefix_may_be_longer_than_max_len(decoder):
    model = peft.attach(decoder(), PrefixTuning(length=30))
    assert {tuple(t.shape) for t in peft.state_dict(model).values()} == {(30, 16)}
    assert bool(torch.isfinite(outputs(model)).all())


def test_training_and_evaluation_mode_of_the_model_survive_the_attaching(decoder):
    for training in (True, False):
        model = peft.attach(decoder().train(training), RECIPES["prefix kv"])
        assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 0}, "length"),
        ({"at": "key"}, '"kv" or "hidden"'),
        ({"init": "zeros"}, '"activations" or "normal"'),
        ({"length": 2, "init_tokens": (1, 2, 3)}, "3 words, but length is 2"),
        ({"length": 2, "init": "normal", "init_tokens": (1, 2)}, "init_tokens"),
        ({"reparameterize": 0}, "reparameterize"),
        ({"reparameterize": 4, "at": "hidden"}, "reparameterize"),
        ({"init_std": -1.0}, "init_std"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixTuning(**options)


def test_init_words_outside_the_vocabulary_are_refused_and_the_model_stays(decoder):
    model = decoder()
    with pytest.raises(ValueError, match="vocabulary has 23"):
        peft.attach(model, PrefixTuning(length=2, init_tokens=(1, 23)))
    assert not peft.attached(model)


# The MLP


def test_reparameterised_prefix_equals_the_numpy_twin(decoder):
    wrapper = train_a_little(peft.attach(decoder().double(), RECIPES["prefix mlp"])).blocks[1].attention
    t = {name: tensor.detach().numpy() for name, tensor in wrapper.tensors().items()}
    for part, out in zip(("key", "value"), wrapper.prefix(), strict=True):
        twin = numpy_peft.prefix_mlp(
            t["source"], t["hidden_weight"], t["hidden_bias"], t[f"{part}_weight"], t[f"{part}_bias"]
        )
        np.testing.assert_allclose(out.detach().numpy(), twin, rtol=1e-12, atol=1e-13)


def test_the_mlp_starts_as_a_linear_layer_does_and_its_source_as_an_embedding(decoder):
    """Every weight fills U(-b, b), b = 1 / sqrt(d_in), and not more; biases are zero; the source is N(0, 1)."""
    h, model = 400, decoder()
    t = peft.attach(model, PrefixTuning(length=200, reparameterize=h)).blocks[0].attention.tensors()
    for name, shape, bound in (("hidden", (h, 16), 1 / 4), ("key", (16, h), 1 / 20), ("value", (16, h), 1 / 20)):
        weight, bias = t[f"{name}_weight"], t[f"{name}_bias"]
        assert weight.shape == shape and 0.99 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)  # of a uniform distribution
        assert not bias.any() and bias.shape == shape[:1]
    assert not torch.equal(t["key_weight"], t["value_weight"])
    assert t["source"].shape == (200, 16) and t["source"].std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("beside", [[], ["houlsby", "lora all"], ["inside_ffn", "prompt"]], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["mlp first", "mlp last"])
def test_folding_keeps_the_outputs_and_leaves_a_plain_prefix(tiny, beside, first):
    model = tiny().train()
    order = ["prefix mlp", *beside] if first else [*beside, "prefix mlp"]
    for number, name in enumerate(order):
        peft.attach(model, RECIPES[name], seed=number)
    before = outputs(train_a_little(model).eval())
    others = {name: t for name, t in peft.state_dict(model).items() if "attention." not in name}
    assert torch.equal(outputs(peft.fold(model)), before)
    names = peft.state_dict(model).keys()
    assert {"blocks.0.attention.key", "blocks.1.attention.value"} <= names and others.keys() <= names
    assert not any(name.endswith(("source", "hidden_weight")) for name in names)
    recipes = [record.method for record in peft.attached(model)]
    assert recipes[order.index("prefix mlp")].reparameterize is None and len(recipes) == len(order)
    with peft.disabled(model):
        assert torch.equal(outputs(model), outputs(tiny()))
    assert torch.equal(outputs(model), before)
    peft.detach(model)
    assert torch.equal(outputs(model), outputs(tiny()))


@pytest.mark.parametrize("length", [3, 30])
def test_a_folded_prefix_trains_on_and_travels_in_a_file(decoder, tmp_path, length):
    model = train_a_little(peft.attach(decoder(), PrefixTuning(length=length, reparameterize=5)))
    peft.save(peft.fold(model), tmp_path / "folded")
    assert len(peft.trainable_parameters(model)) == 4
    assert torch.equal(outputs(peft.load(decoder(), tmp_path / "folded")), outputs(model))


def test_folding_without_an_mlp_is_refused(decoder):
    for model in (decoder(), peft.attach(decoder(), RECIPES["prefix kv"])):
        with pytest.raises(ValueError, match="nothing to fold"):
            peft.fold(model)


def test_two_mlps_on_different_layers_are_folded_each_by_its_own(decoder, tmp_path):
    recipes = [
        PrefixTuning(length=3, reparameterize=5, layers=(0,)),
        PrefixTuning(length=2, reparameterize=7, layers=(1,), gated=True),
    ]
    model = decoder()
    for seed, recipe in enumerate(recipes):
        peft.attach(model, recipe, seed=seed)
    before = outputs(train_a_little(model))
    peft.save(peft.fold(model), tmp_path / "folded")
    assert torch.equal(outputs(model), before)
    assert [record.method for record in peft.attached(model)] == [replace(r, reparameterize=None) for r in recipes]
    assert torch.equal(outputs(peft.load(decoder(), tmp_path / "folded")), before)


def test_folding_keeps_what_stands_round_the_prefix(decoder):
    """A hook, what is frozen, the mode, autocast and `disabled` outside: none of it is the MLP's."""
    model = train_a_little(peft.attach(decoder(), PrefixTuning(length=3, reparameterize=5, gated=True)))
    first, second = (block.attention for block in model.blocks)
    first.register_forward_hook(lambda module, inputs, y: 2 * y)
    second.requires_grad_(False)
    expected, base = outputs(model), outputs(decoder())
    with torch.autocast("cpu", dtype=torch.bfloat16), peft.disabled(model):
        peft.fold(model)
    assert torch.equal(outputs(model), expected) and not torch.equal(expected, base)
    assert model.blocks[0].attention is first and first.key.requires_grad and not second.key.requires_grad


def test_zero_scores_give_the_prefix_its_share_by_count(decoder):
    """With q = 0 all scores are equal: n of n + S parts of the output are the prefix's. A number by hand."""
    model = peft.attach(decoder(causal=False), PrefixTuning(length=3, init="normal"))
    base = model.blocks[0].attention.base
    with torch.no_grad():
        base.query.weight.zero_()
        base.query.bias.zero_()
    with recorded(model) as weights:
        model.hidden(torch.tensor([[1, 2, 3, 4, 5]]))
    assert weights[0][..., :3].sum(-1).flatten().tolist() == pytest.approx([3 / 8] * 10, abs=1e-6)
    assert math.isclose(weights[0][0, 0, 0, 0].item(), 1 / 8, abs_tol=1e-6)

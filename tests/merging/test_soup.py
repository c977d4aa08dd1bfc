"""Soups: the mean of updates and of modules trained whole, exactly; and what cannot be mixed."""

import pytest
import torch
from reference.method_cases import batch, outputs, train_a_little

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.heads import SequenceClassifier
from peft import BottleneckAdapter, LoRA

CONFIG = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24)


def classifier(recipe=None, seed=0, also=("head",), base=7, n_classes=3):
    """A model whose LoRA and head are anything but at their start."""
    model = SequenceClassifier(Transformer(CONFIG, seed=base), n_classes=n_classes, seed=seed).eval()
    if recipe is None:
        return model
    peft.attach(model, recipe, seed=seed, train_also=also)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in peft.trainable_parameters(model).values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


RECIPES = (LoRA(rank=2), LoRA(rank=3, alpha=7.0, targets=("up", "value")))


@pytest.mark.parametrize("recipes", [RECIPES[:1] * 3, RECIPES], ids=["one recipe", "two recipes"])
def test_it_is_the_model_with_the_mean_of_all_weights(recipes):
    """Merged into plain weights, averaged tensor by tensor, and never a LoRA in it: the oracle."""
    models = [classifier(recipe, seed) for seed, recipe in enumerate(recipes, start=1)]
    mixed = peft.soup(models, classifier())
    plain = classifier()
    copies = [peft.merged_copy(model).state_dict() for model in models]
    plain.load_state_dict({name: torch.stack([own[name] for own in copies]).mean(dim=0) for name in copies[0]})
    tokens, mask = batch()
    torch.testing.assert_close(mixed(tokens, mask), plain(tokens, mask), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed(tokens, mask), models[0](tokens, mask), atol=1e-2)


def test_a_soup_of_one_is_that_one_and_a_soup_of_equals_is_each():
    model = classifier(LoRA(rank=2), seed=1)
    expected = model(*batch())
    for models in ([model], [model] * 4):
        torch.testing.assert_close(peft.soup(models, classifier())(*batch()), expected, rtol=1e-5, atol=1e-5)


def test_it_is_attached_saved_and_taken_out_like_any_lora(tmp_path):
    base = classifier()
    weight = base.transformer.blocks[0].attention.query
    mixed = peft.soup([classifier(LoRA(rank=2), seed) for seed in (1, 2)], base)
    assert mixed is base and peft.attached(mixed)[0].method.rank == 4
    trained = set(peft.trainable_parameters(mixed))
    assert {"head.weight", "head.bias", "transformer.blocks.0.attention.query.A"} <= trained
    peft.save(mixed, tmp_path / "soup.safetensors")
    again = peft.load(classifier(), tmp_path / "soup.safetensors")
    assert torch.equal(again(*batch()), mixed(*batch()))
    assert peft.detach(mixed).transformer.blocks[0].attention.query is weight


def test_the_models_it_is_made_of_stay_as_they_were(decoder):
    models = [train_a_little(peft.attach(decoder(), LoRA(rank=2), seed=seed)) for seed in (1, 2)]
    before = [outputs(model) for model in models]
    peft.soup(models, decoder())
    assert all(torch.equal(outputs(model), old) for model, old in zip(models, before, strict=True))


@pytest.mark.parametrize("n, rank", [(2, 16), (5, 16)])
def test_a_soup_of_high_ranks_is_exact_within_the_width(n, rank):
    """2 * 8 fills the width of 16; 5 * 8 = 40 is more than any matrix there has, and the sum is kept all the same."""
    models = [classifier(LoRA(rank=8, targets=("query", "up")), seed) for seed in range(1, n + 1)]
    mixed = peft.soup(models, classifier())
    assert peft.attached(mixed)[0].method.rank == rank
    for site in ("blocks.0.attention.query", "blocks.1.feedforward.up"):
        mean = sum(model.transformer.get_submodule(site).changed_weight() for model in models) / n
        torch.testing.assert_close(mixed.transformer.get_submodule(site).changed_weight(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_models", [1, 2, 3])
def test_each_width_has_the_rank_that_it_needs_and_not_that_of_another(n_models, tmp_path):
    """A layer to 3 classes has room for rank 3; the others need 2 for each model. A file holds such a soup as well."""

    def make(seed):
        recipe = LoRA(rank=2, alpha=5.0, targets=("head", "query"))
        return train_a_little(peft.attach(classifier(), recipe, seed=seed), seed)

    models, base = [make(seed) for seed in range(1, n_models + 1)], classifier()
    mixed = peft.soup(models, base)
    assert [record.method.rank for record in peft.attached(mixed)] == [[2], [4, 3], [6, 3]][n_models - 1]
    for site in ("head", "transformer.blocks.1.attention.query"):
        mean = sum(model.get_submodule(site).changed_weight() for model in models) / n_models
        torch.testing.assert_close(mixed.get_submodule(site).changed_weight(), mean, rtol=1e-4, atol=1e-5)
    peft.save(mixed, tmp_path / "soup.safetensors")
    assert torch.equal(peft.load(classifier(), tmp_path / "soup.safetensors")(*batch()), mixed(*batch()))
    narrow = classifier(n_classes=2)
    with pytest.raises(ValueError, match=r"other base weights|rank 3 exceeds"):
        peft.soup(models, narrow)
    assert not peft.attached(narrow)


def test_a_trained_module_may_have_tensors_of_the_names_of_factors():
    models = []
    for seed in (1, 2):
        model = classifier(seed=seed)
        model.head.A = torch.nn.Parameter(torch.full((2,), float(seed)))
        models.append(peft.attach(model, LoRA(rank=2), seed=seed, train_also=("head",)))
    base = classifier()
    base.head.A = torch.nn.Parameter(torch.zeros(2))
    assert peft.soup(models, base).head.A.tolist() == [1.5, 1.5]


def broken(model):
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    return model


BAD = {
    "none": (list, "at least one model"),
    "nothing attached": (lambda: [classifier(LoRA(rank=2)), classifier()], "no method is attached"),
    "another method": (lambda: [classifier(BottleneckAdapter())], "single plain LoRA"),
    "two methods": (lambda: [peft.attach(classifier(LoRA(rank=2)), BottleneckAdapter())], "single plain LoRA"),
    "DoRA": (lambda: [classifier(peft.DoRA(rank=2))], "single plain LoRA"),
    "other modules beside": (
        lambda: [classifier(LoRA(rank=2)), classifier(LoRA(rank=2), also=())],
        "different modules",
    ),
    "another head": (lambda: [classifier(LoRA(rank=2)), classifier(LoRA(rank=2), n_classes=2)], "different modules"),
    "another base": (lambda: [classifier(LoRA(rank=2)), classifier(LoRA(rank=2), base=8)], "other base weights"),
    "a head that is a NaN": (lambda: [broken(classifier(LoRA(rank=2)))], "NaN"),
}


def test_a_base_that_carries_something_keeps_it():
    base = classifier(BottleneckAdapter())
    before = base(*batch())
    with pytest.raises(ValueError, match=r"detach\(base\) first"):
        peft.soup([classifier(LoRA(rank=2))], base)
    assert torch.equal(base(*batch()), before)


def test_running_statistics_of_a_trained_module_do_not_stop_it():
    models = []
    for seed in (1, 2):
        model = classifier(seed=seed)
        model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(16), model.head)
        models.append(peft.attach(model, LoRA(rank=2), seed=seed, train_also=("head",)))
    base = classifier()
    base.head = torch.nn.Sequential(torch.nn.BatchNorm1d(16), base.head)
    assert torch.isfinite(peft.soup(models, base)(*batch())).all()


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_mixed_is_refused_and_the_base_stays_as_it_was(case):
    make, message = BAD[case]
    base = classifier()
    before = {name: p.clone() for name, p in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        peft.soup(make(), base)
    assert not peft.attached(base)
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())

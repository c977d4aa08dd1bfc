import math

import pytest
import torch

from minitransformer import SequenceClassifier, Transformer, TransformerConfig

SIZES = {"vocab_size": 300, "max_len": 40, "d_model": 64, "n_heads": 4, "n_layers": 3, "d_ff": 256, "n_segments": 200}
GPT2 = Transformer(TransformerConfig(**SIZES, init="gpt2", lm_head="bert"))
UNIT = Transformer(TransformerConfig(**SIZES, init="unit_embedding", logit_scale=64**-0.5))


def assert_normal(weight, std):
    """Mean and spread within four standard errors; the tails as a normal's."""
    n, values = weight.numel(), weight.detach().flatten()
    assert abs(values.mean().item()) < 4 * std / math.sqrt(n)
    assert abs(values.std().item() / std - 1) < 4 / math.sqrt(2 * n)
    assert abs((values.abs() < std).float().mean().item() - 0.6827) < 4 * math.sqrt(0.68 * 0.32 / n)


@pytest.mark.parametrize(
    "name, std",
    [
        ("embedding.token", 0.02),
        ("embedding.position", 0.02),
        ("embedding.segment", 0.02),
        ("blocks.1.attention.query", 0.02),
        ("blocks.1.attention.key", 0.02),
        ("blocks.1.attention.value", 0.02),
        ("blocks.1.attention.output", 0.02 / math.sqrt(6)),
        ("blocks.2.feedforward.up", 0.02),
        ("blocks.2.feedforward.down", 0.02 / math.sqrt(6)),
        ("head.dense", 0.02),
    ],
)
def test_gpt2_weights_have_the_stated_spread(name, std):
    assert_normal(GPT2.get_submodule(name).weight, std)


@pytest.mark.parametrize(
    "name, std",
    [
        ("embedding.token", 1.0),
        ("embedding.segment", 0.02),
        ("blocks.0.attention.query", 1 / 8),
        ("blocks.0.attention.output", 1 / 8),
        ("blocks.2.feedforward.up", 1 / 8),
        ("blocks.2.feedforward.down", 1 / 16),
    ],
)
def test_unit_embedding_weights_have_the_stated_spread(name, std):
    assert_normal(UNIT.get_submodule(name).weight, std)


def test_unit_embedding_positions_are_sinusoids():
    table = UNIT.embedding.position.weight
    for t, i in [(0, 0), (1, 0), (7, 5), (39, 31)]:
        angle = t / 10_000 ** (2 * i / 64)
        torch.testing.assert_close(
            table[t, 2 * i : 2 * i + 2], torch.tensor([math.sin(angle), math.cos(angle)]), atol=1e-5, rtol=0
        )


def test_sinusoids_fit_an_odd_width():
    from minitransformer.initialization import sinusoids

    assert torch.equal(sinusoids(4, 5)[0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("model", [GPT2, UNIT], ids=["gpt2", "unit_embedding"])
def test_biases_are_0_and_norms_are_1(model):
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name


def test_unit_embedding_gives_logits_of_about_unit_variance():
    tokens = torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(0))
    assert 0.7 < UNIT(tokens).std().item() < 1.4


def test_the_seed_fixes_every_bit():
    config = TransformerConfig(**SIZES)
    one, same, other = Transformer(config, seed=3), Transformer(config, seed=3), Transformer(config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.token.weight, other.embedding.token.weight)


@pytest.mark.parametrize("build", [lambda: Transformer(GPT2.config), lambda: SequenceClassifier(GPT2, 2)])
def test_the_callers_random_state_is_left_alone(build):
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_gives_the_same_weights_whatever_the_callers_random_state(dtype):
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(1)
        one = Transformer(GPT2.config)
        torch.manual_seed(2)
        other = Transformer(GPT2.config)
        assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
        assert one.norm.weight.dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_on_the_meta_device_a_model_has_shapes_only():
    """As large as GPT-3 (Brown et al. 2020, table 2.1), in no time; shapes are computed as well."""
    sizes = {"vocab_size": 50257, "max_len": 2048, "d_model": 12288, "n_heads": 96, "n_layers": 4, "d_ff": 49152}
    with torch.device("meta"):
        model = SequenceClassifier(Transformer(TransformerConfig(**sizes)), 2)
        assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 2)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert SequenceClassifier(GPT2.to("cpu"), 2).head.weight.device.type == "cpu"

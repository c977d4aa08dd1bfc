import dataclasses

import pytest

from minitransformer import TransformerConfig

SIZES = {"vocab_size": 10, "max_len": 8}


def test_the_width_of_a_head_is_its_share_of_d_model():
    assert TransformerConfig(**SIZES, d_model=12, n_heads=3).d_head == 4


def test_a_config_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig(**SIZES).d_model = 3


@pytest.mark.parametrize("name", ["vocab_size", "max_len", "d_model", "n_heads", "n_layers", "d_ff"])
def test_sizes_are_at_least_1(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TransformerConfig(**(SIZES | {name: 0}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_model": 10, "n_heads": 4}, "d_model=10 does not divide into n_heads=4 heads; choose d_model"),
        ({"n_segments": -1}, "n_segments must be 0"),
        ({"dropout": 1.0}, r"dropout is a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout is a probability"),
        ({"norm": "middle"}, "norm='middle' is unknown; choose one of pre, post"),
        ({"activation": "silu"}, "activation='silu' is unknown; choose one of gelu, gelu_tanh, relu"),
        ({"lm_head": "free"}, "lm_head='free' is unknown; choose one of tied, bert, none"),
        ({"attention": "flash"}, "attention='flash' is unknown; choose one of fused, written_out"),
        ({"init": "zero"}, "init='zero' is unknown; choose one of gpt2, unit_embedding"),
        ({"lm_head": "bert", "logit_scale": 0.5}, 'lm_head="bert" has no logit_scale'),
    ],
)
def test_a_bad_choice_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SIZES | change))

import dataclasses
import json

import numpy as np
import pytest

from minitransformer import TransformerConfig

SIZES = {"vocab_size": 10, "max_len": 8}


def test_the_width_of_a_head_is_its_share_of_d_model():
    assert TransformerConfig(**SIZES, d_model=12, n_heads=3).d_head == 4


def test_heads_of_another_width_need_not_divide_d_model():
    config = TransformerConfig(**SIZES, d_model=10, n_heads=4, head_dim=6, n_kv_heads=2)
    assert (config.d_head, config.d_kv) == (6, 12)


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
        ({"activation": "swish"}, "activation='swish' is unknown; choose one of gelu, gelu_tanh, relu, silu"),
        ({"lm_head": "free"}, "lm_head='free' is unknown; choose one of tied, untied, bert, none"),
        ({"position": "alibi"}, "position='alibi' is unknown; choose one of learned, rotary"),
        ({"norm_type": "none"}, "norm_type='none' is unknown; choose one of layer, rms"),
        (
            {"bias": "some"},
            "bias='some' is unknown; choose one of all, none, query.key.value, query.key.value.output, gate.up.down",
        ),
        ({"n_kv_heads": 3}, r"n_kv_heads=3 must divide n_heads=4 \(or be 0: as many\)"),
        ({"n_kv_heads": 8}, "n_kv_heads=8 must divide n_heads=4"),
        ({"n_kv_heads": -2}, "n_kv_heads=-2 must divide"),
        ({"head_dim": -1}, "a head must have a width, and an even one for rotary positions, got -1"),
        ({"head_dim": 3, "position": "rotary"}, "an even one for rotary positions, got 3"),
        ({"rope_theta": 5.0}, 'rope_theta=5.0 goes with position="rotary", and must be above 0'),
        ({"rope_theta": 0.0, "position": "rotary"}, "rope_theta=0.0 goes with"),
        ({"attention": "flash"}, "attention='flash' is unknown; choose one of fused, written_out"),
        ({"init": "zero"}, "init='zero' is unknown; choose one of gpt2, unit_embedding"),
        ({"lm_head": "bert", "logit_scale": 0.5}, 'lm_head="bert" has no logit_scale'),
        ({"lm_head": "none", "logit_scale": 0.5}, 'lm_head="none" has no logit_scale'),
        ({"logit_scale": 0.0}, "norm_eps and logit_scale must be above 0, got 1e-05 and 0.0"),
        ({"norm_eps": -1.0}, "norm_eps and logit_scale must be above 0, got -1.0 and 1.0"),
    ],
)
def test_a_bad_choice_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SIZES | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_model": 128.0}, "d_model must be an integer, got 128.0"),
        ({"n_heads": True}, "n_heads must be an integer, got True"),
        ({"vocab_size": "10"}, "vocab_size must be an integer, got '10'"),
        ({"n_segments": None}, "n_segments must be an integer, got None"),
        ({"dropout": float("nan")}, "dropout must be a finite number, got nan"),
        ({"norm_eps": float("inf")}, "norm_eps must be a finite number, got inf"),
        ({"logit_scale": "1"}, "logit_scale must be a finite number, got '1'"),
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing must be True or False, got 'no'"),
        ({"norm": None}, "norm=None is unknown"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_value_of_another_kind_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SIZES | change))


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_become_pythons_own():
    config = TransformerConfig(np.int64(10), np.int32(8), dropout=np.float32(0.25), logit_scale=2)
    assert config == TransformerConfig(10, 8, dropout=0.25, logit_scale=2.0)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["vocab_size"] == 10
    assert type(config.logit_scale) is float

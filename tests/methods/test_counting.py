"""Every count equals its closed form."""

import dataclasses

import pytest
import torch
from reference.method_cases import RECIPES, SETS, train_a_little

import peft
from minitransformer import Transformer, TransformerConfig
from peft import BitFit, BottleneckAdapter, LNTuning, LoRA, PrefixTuning, PromptTuning

OPTIONS = [
    *RECIPES.values(),
    *(LoRA(rank=3, targets=(target,)) for target in peft.ALL_LINEARS),
    LoRA(rank=1, targets=("blocks.1.feedforward.up", "attention.output")),
    LoRA(rank=2, targets=("query", "attention.query", "blocks.0.attention.query")),
    LoRA(rank=2, targets=peft.ALL_LINEARS, train=("A",)),
    LoRA(rank=2, targets=peft.ALL_LINEARS, train=("B",)),
]


def measured(model):
    return sum(p.numel() for p in peft.trainable_parameters(model).values())


@pytest.mark.parametrize("recipe", OPTIONS, ids=str)
def test_count_equals_the_closed_form(decoder, recipe):
    config = decoder(n_layers=3, causal=False, norm="post").config
    model = peft.attach(Transformer(config), recipe)
    assert measured(model) == peft.expected_parameters(config, recipe) == peft.parameter_table(model).trained


@pytest.mark.parametrize("recipes", SETS.values(), ids=SETS.keys())
def test_counts_of_several_methods_add_up_and_the_share_is_of_the_base(decoder, recipes):
    model = decoder()
    base = sum(p.numel() for p in model.parameters())
    for recipe in recipes:
        peft.attach(model, recipe)
    table = peft.parameter_table(model)
    assert table.trained == sum(peft.expected_parameters(model.config, recipe) for recipe in recipes)
    assert table.base == base
    assert table.share == pytest.approx(table.trained / base)
    assert f"trained: {table.trained:,} of {base:,}" in str(table)


def test_lora_counts_the_dense_map_of_berts_head_where_it_is_a_target(decoder):
    recipe = LoRA(rank=2, targets=("dense", "query"))
    model = decoder(causal=False, lm_head="bert")
    peft.attach(model, recipe)
    assert measured(model) == peft.expected_parameters(model.config, recipe)


def test_an_unmatched_target_is_no_silent_zero_in_the_closed_form(decoder):
    with pytest.raises(ValueError, match=r"'qurey'.*query"):
        peft.expected_parameters(decoder().config, LoRA(rank=2, targets=("value", "qurey")))


def test_published_counts():
    gpt3 = TransformerConfig(50257, 2048, d_model=12288, n_heads=96, n_layers=96, d_ff=49152)
    base = TransformerConfig(50265, 512, d_model=768, n_heads=12, n_layers=12, d_ff=3072)
    large = TransformerConfig(50265, 512, d_model=1024, n_heads=16, n_layers=24, d_ff=4096)
    assert peft.expected_parameters(gpt3, LoRA(rank=1)) == 4_718_592  # "4.7M", Hu et al. 2022, table 4
    assert peft.expected_parameters(base, LoRA(rank=8)) == 294_912  # "0.3M", table 2
    assert peft.expected_parameters(large, LoRA(rank=8)) == 786_432  # "0.8M", table 2
    houlsby = BottleneckAdapter(bottleneck=64)
    assert peft.expected_parameters(large, houlsby) == 24 * 2 * (2 * 1024 * 64 + 64 + 1024)
    assert peft.expected_parameters(base, PrefixTuning(length=10)) == 12 * 2 * 10 * 768
    assert peft.expected_parameters(base, PromptTuning(length=100)) == 76_800


def test_folding_the_mlp_away_leaves_the_count_of_a_plain_prefix(decoder):
    model = peft.attach(decoder(), RECIPES["prefix mlp"])
    peft.fold(train_a_little(model))
    plain = dataclasses.replace(RECIPES["prefix mlp"], reparameterize=None)
    assert measured(model) == peft.expected_parameters(model.config, plain) == 2 * 2 * 3 * 16


def test_the_table_of_a_model_without_a_method_counts_full_fine_tuning(decoder):
    model = decoder()
    table = peft.parameter_table(model)
    assert table.trained == table.base == sum(p.numel() for p in model.parameters())
    assert torch.tensor([row.numbers for row in table.rows]).sum() == table.base


@pytest.mark.parametrize("norm, outside", [("pre", 1), ("post", 0)])
@pytest.mark.parametrize("embedding_norm", [False, True])
@pytest.mark.parametrize("recipe, in_a_block", [(BitFit(), 6 * 16 + 24), (LNTuning(), 2 * 16)], ids=str)
def test_the_norms_outside_of_the_blocks_are_counted(decoder, norm, outside, embedding_norm, recipe, in_a_block):
    model = peft.attach(decoder(norm=norm, embedding_norm=embedding_norm), recipe)
    expected = 2 * in_a_block + (outside + embedding_norm) * 16
    assert measured(model) == peft.expected_parameters(model.config, recipe) == expected


def test_the_table_as_it_is_printed(decoder):
    """One line for each tensor that a method brought, trained or not, and one for all others."""
    model = peft.attach(decoder(n_layers=1), LoRA(rank=2, targets=("query",), train=("B",)))
    peft.merge(model)
    lines = str(peft.parameter_table(model)).splitlines()
    assert lines == [
        "blocks.0.attention.query.A  [2, 16]     32  frozen",
        "blocks.0.attention.query.B  [16, 2]     32  trained",
        "(20 frozen tensors)                  2,552  frozen",
        "trained: 32 of 2,552 in the base model = 1.25%",
        "merged at present: blocks.0.attention.query.weight",
    ]


def test_the_first_merged_weight_is_named_and_the_others_counted(decoder):
    model = peft.merge(peft.attach(decoder(n_layers=1), LoRA(rank=2)))
    table = peft.parameter_table(model)
    assert str(table).splitlines()[-1] == "merged at present: blocks.0.attention.query.weight and 1 more"


def test_a_notebook_shows_the_table_as_it_is_printed(decoder):
    table = peft.parameter_table(peft.attach(decoder(n_layers=1), LoRA(rank=2, targets=("query",))))
    assert repr(table) == str(table) and str(table).startswith("blocks.0.attention.query.A  [2, 16]     32  trained\n")
    assert str(table).endswith("\ntrained: 64 of 2,552 in the base model = 2.51%")


def test_a_model_of_trained_tensors_only_has_no_line_for_the_others(decoder):
    model = decoder()
    *shown, last = str(peft.parameter_table(model)).splitlines()
    assert [line.split()[0] for line in shown] == [name for name, _ in model.named_parameters()]
    assert all(line.endswith("  trained") for line in shown) and last.startswith("trained: ")


def test_a_model_that_is_trained_whole_has_no_base(decoder):
    table = peft.parameter_table(peft.attach(decoder(), LoRA(rank=2), train_also=("embedding", "blocks", "norm")))
    assert table.base == 0 and "of 0 in the base model = inf%" in str(table)

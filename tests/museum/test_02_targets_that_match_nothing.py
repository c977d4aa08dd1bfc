"""Targets that match nothing, or too much.

A list of target names is compared with the names of the modules. A misspelt name beside a right one is simply not
found: half of the intended weights stay untouched, and nothing says so. Comparing by substring is no better: "norm"
finds "normalized_query", "bias" trains "debiased".

Found in: https://github.com/huggingface/peft/issues/1959, https://github.com/huggingface/peft/issues/3693

The lesson: every target must match something, by whole parts of a name, and the error lists what there is.
"""

import pytest
import torch
from exhibit import caught, small_model
from torch import nn

import peft


def find_what_there_is(targets, names):
    """The wrong way, first sort: whatever matches is taken, and the rest forgotten."""
    return [name for name in names if any(name.split(".")[-1] == target for target in targets)]


def find_by_substring(targets, names):
    """The wrong way, second sort."""
    return [name for name in names if any(target in name for target in targets)]


def our_find(targets, names):
    return peft.sites.find(tuple(targets), dict.fromkeys(names), "linear layer")


def check_a_misspelt_target_is_noticed(find):
    try:
        find(["query", "valeu"], ["attention.query", "attention.value"])
    except ValueError as error:
        assert "valeu" in str(error) and "value" in str(error)
        return
    raise AssertionError("the misspelt target was ignored")


def check_only_whole_names_match(find):
    assert find(["bias"], ["debiased.weight", "layer.bias"]) == ["layer.bias"]
    assert find(["query"], ["attention.query", "attention.query_norm", "subquery"]) == ["attention.query"]


def test_the_wrong_ways():
    caught(check_a_misspelt_target_is_noticed, find_what_there_is)
    caught(check_a_misspelt_target_is_noticed, find_by_substring)
    caught(check_only_whole_names_match, find_by_substring)


def test_ours():
    check_a_misspelt_target_is_noticed(our_find)
    check_only_whole_names_match(our_find)


def test_in_a_model_nothing_is_attached_when_one_of_two_targets_is_wrong():
    model = small_model()
    with pytest.raises(ValueError, match=r"'valeu' matches no linear layer; there are .*value"):
        peft.attach(model, peft.LoRA(rank=2, targets=("query", "valeu")))
    assert peft.attached(model) == [] and all(p.requires_grad for p in model.parameters())


def test_a_neighbour_with_a_longer_name_is_left_alone():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "query_norm": nn.Linear(4, 4)})
    peft.attach(model, peft.LoRA(rank=2, targets=("query",)))
    assert isinstance(model["query"], peft.Wrapper) and isinstance(model["query_norm"], nn.Linear)
    assert torch.is_tensor(model["query"].A)

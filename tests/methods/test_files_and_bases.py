"""A file fits the base it was trained on, holds all that was trained, and asks for nothing that it does not hold."""

import contextlib
import copy
import os
import resource
import stat
from dataclasses import dataclass, fields
from enum import Enum
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference.method_cases import RECIPES, assert_same, each_of, fingerprint, outputs, train_a_little
from torch import nn

import peft
from minitransformer.feedforward import FeedForward
from minitransformer.files import pack
from minitransformer.heads import SequenceClassifier
from minitransformer.tasks.real.dual_encoder import DualEncoder
from peft import LoRA, checkpoint, contents

QUERY = LoRA(rank=2, targets=("query",))


# The identity of a base


def with_another(**changes):
    """The same weights, computed with another way."""

    def change(model, decoder):
        other = decoder(**changes)
        other.load_state_dict(model.state_dict())
        return other

    return change


def with_attribute(path, name, value):
    def change(model, _):
        setattr(model.get_submodule(path), name, value)
        return model

    return change


OTHER_BASES = {
    **{f"{name}={value}": with_another(**{name: value}) for name, value in {
        "n_heads": 4, "activation": "relu", "norm_eps": 1e-3, "causal": False, "logit_scale": 0.5,
    }.items()},
    "heads of one layer": with_attribute("blocks.1.attention", "n_heads", 4),
    "eps of one norm": with_attribute("blocks.0.norm_attention", "eps", 0.1),
    "post-norm in one block": with_attribute("blocks.1", "pre_norm", False),
    "another class": with_attribute("blocks.1.feedforward", "__class__", type("Other", (FeedForward,), {})),
}  # fmt: skip
SAME_BASES = {
    **{f"{name}={value}": with_another(**{name: value}) for name, value in {
        "dropout": 0.3, "attention": "written_out", "gradient_checkpointing": True, "init": "unit_embedding",
    }.items()},
    "a note": with_attribute("", "note", "step 300"),
    "a note in a layer": with_attribute("blocks.0.attention", "attached", [1, 2]),
    "in training": lambda model, _: model.train(),
    "frozen": lambda model, _: model.requires_grad_(False),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHER_BASES.values(), ids=OTHER_BASES.keys())
def test_the_same_weights_computed_with_in_another_way_are_another_base(decoder, tmp_path, change):
    model = train_a_little(peft.attach(decoder(), QUERY))
    peft.save(model, tmp_path / "file")
    other = change(decoder(), decoder)
    before = fingerprint(other)
    with pytest.raises(ValueError, match=r"another base model .*n_heads"):
        peft.load(other, tmp_path / "file")
    assert_same(before, fingerprint(other))


@pytest.mark.parametrize("change", SAME_BASES.values(), ids=SAME_BASES.keys())
def test_what_changes_no_output_changes_no_base(decoder, tmp_path, change):
    model = train_a_little(peft.attach(decoder(), QUERY))
    peft.save(model, tmp_path / "file")
    other = peft.load(change(decoder(), decoder), tmp_path / "file").eval()
    torch.testing.assert_close(outputs(other), outputs(model))


class Scaled(nn.Module):
    def __init__(self, scale, function=torch.tanh, table=(1.0,)):
        super().__init__()
        self.linear, self.scale, self.function, self.table = nn.Linear(3, 3), scale, function, torch.tensor(table)
        self.register_buffer("shift", torch.zeros(3))


class Renamed(Scaled):
    pass


def test_the_settings_of_other_models_belong_to_their_base(decoder):
    torch.manual_seed(0)
    makers = [
        lambda: Scaled(1.0), lambda: Scaled(2.0), lambda: Scaled(1), lambda: Scaled(1.0, torch.relu),
        lambda: Scaled(1.0, table=(2.0,)), lambda: Renamed(1.0), lambda: Scaled(np.float32(3.0)),
        lambda: SequenceClassifier(decoder(), 3), lambda: SequenceClassifier(decoder(), 3, pool="first"),
        lambda: DualEncoder(decoder(causal=False)), lambda: DualEncoder(decoder(causal=False), scale=1.0),
    ]  # fmt: skip
    hashes = []
    for make in [*makers, *makers]:
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        hashes.append(checkpoint.base_hash(model))
    first, second = hashes[: len(makers)], hashes[len(makers) :]
    assert first == second and len(set(first)) == len(makers)
    shifted = makers[0]()
    with torch.no_grad():
        for tensor in (*shifted.parameters(), *shifted.buffers()):
            tensor.fill_(1.0)
    assert checkpoint.base_hash(shifted) != first[0]


class Pool(Enum):
    FIRST = 1
    MEAN = 2


class Told(nn.Module):
    def __init__(self, options=None, dropout=0.1, inplace=False, device="cpu", scale=1.0, shift=0.0):
        super().__init__()
        self.drop, self.relu, self.device = nn.Dropout(dropout), nn.ReLU(inplace), torch.device(device)
        self.options, self._scale, self.training = options, scale, True
        self.register_buffer("kept_in_no_file", torch.full((1,), shift), persistent=False)


def test_settings_of_any_kind_are_told_apart_and_those_of_training_and_place_are_not():
    base = checkpoint.base_hash(Told())
    kinds = [
        {"a", "b"},
        {"a", "c"},
        SimpleNamespace(a=1),
        SimpleNamespace(a=2),
        {"a": [1, {2}]},
        {"a": [1, {3}]},
        nn.ReLU,
        partial(nn.functional.gelu, approximate="tanh"),
        partial(nn.functional.gelu, approximate="none"),
        torch.float16,
        torch.float32,
        Pool.FIRST,
        Pool.MEAN,
        np.arange(3),
        np.arange(4),
    ]
    hashes = [checkpoint.base_hash(Told(kind)) for kind in kinds]
    assert len({base, *hashes}) == 1 + len(kinds)
    assert hashes == [checkpoint.base_hash(Told(copy.deepcopy(kind))) for kind in kinds]
    assert base == checkpoint.base_hash(Told(dropout=0.5, inplace=True, device="meta").eval())
    assert len({base, checkpoint.base_hash(Told(scale=2.0)), checkpoint.base_hash(Told(shift=1.0))}) == 3


def test_a_file_of_the_first_format_names_the_cure(decoder, tmp_path):
    model = train_a_little(peft.attach(decoder(), QUERY))
    record = {"format": "peft-from-scratch 1", "methods": [], "base": "", "merged": False}
    (tmp_path / "old").write_bytes(pack(peft.state_dict(model), record, contents.KEY))
    with pytest.raises(ValueError, match=r"another format than .*load_state_dict"):
        peft.load(decoder(), tmp_path / "old")


# Everything that was trained


def test_a_tensor_that_is_trained_and_declared_by_no_method_is_named(decoder, tmp_path):
    model = peft.attach(decoder(), QUERY)
    model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm.weight, norm.bias \(2 tensors\) would be left out.*train_also"):
        peft.save(model, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    model.norm.requires_grad_(False)
    model.mine = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"mine .* would be left out"):
        peft.save(model, tmp_path / "file")


def normed(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("present", [True, False])
def test_the_running_statistics_of_a_module_that_is_trained_whole_travel_with_it(tmp_path, present):
    model = peft.attach(normed(), LoRA(rank=2, targets=("0",)), train_also=("1",))
    x = 3 + torch.randn(50, 4)
    model(x)
    train_a_little(model)
    peft.save(model, tmp_path / "file")
    other = normed()
    if present:
        peft.attach(other, LoRA(rank=2, targets=("0",)), train_also=("1",))
    peft.load(other, tmp_path / "file")
    assert other[1].num_batches_tracked == 1
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= peft.state_dict(model).keys()
    assert not any("running" in name for name in peft.trainable_parameters(model))


class Listed(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self._all = [self.weight, self.bias]


def test_a_module_that_keeps_its_parameters_in_a_list_as_well_is_trained_whole_and_loaded(tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.ModuleDict({"first": nn.Linear(4, 4), "then": Listed()})

    model = train_a_little(peft.attach(made(), LoRA(rank=2, targets=("first",)), train_also=("then",)))
    peft.save(copy.deepcopy(model), tmp_path / "file")
    x = torch.linspace(-1, 1, 8).view(2, 4)
    assert torch.equal(peft.load(made(), tmp_path / "file")["then"](x), model["then"](x))


def test_running_statistics_that_moved_in_the_base_make_it_another_base(tmp_path):
    model = peft.attach(normed(), LoRA(rank=2, targets=("0",)))
    model(3 + torch.randn(50, 4))
    peft.save(model, tmp_path / "file")
    with pytest.raises(ValueError, match="another base"):
        peft.load(normed(), tmp_path / "file")


def test_a_load_that_fails_late_puts_back_what_a_module_trained_whole_held(decoder, tmp_path, monkeypatch):
    model = train_a_little(peft.attach(decoder(), QUERY, train_also=("norm",)))
    peft.save(peft.merge(model), tmp_path / "file")
    fresh = decoder()
    before = fingerprint(fresh)
    monkeypatch.setattr(checkpoint, "merge", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peft.load(fresh, tmp_path / "file")
    assert_same(before, fingerprint(fresh))


def test_a_load_that_is_refused_says_why_though_the_present_tensors_are_broken(decoder, tmp_path):
    peft.save(peft.attach(decoder(seed=1), QUERY), tmp_path / "other base")
    model = peft.attach(decoder(), QUERY)
    with torch.no_grad():
        model.blocks[0].attention.query.B[0] = float("nan")
    with pytest.raises(ValueError, match="another base"):
        peft.load(model, tmp_path / "other base")
    assert peft.state_dict(model)["blocks.0.attention.query.B"][0].isnan().all()


@each_of("recipe", RECIPES)
def test_another_seed_is_no_other_recipe(decoder, tmp_path, recipe):
    model = train_a_little(peft.attach(decoder(), recipe, seed=1))
    peft.save(model, tmp_path / "file")
    other = peft.load(peft.attach(decoder(), recipe, seed=2), tmp_path / "file")
    assert torch.equal(outputs(other), outputs(model)) and peft.attached(other) == peft.attached(model)
    peft.save(other, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


# Values of a recipe


NUMBERS = [
    (lambda: LoRA(np.int64(2), np.float64(3), dropout=np.float32(0.5)), lambda: LoRA(2, 3.0, dropout=0.5)),
    (lambda: LoRA(rank=torch.tensor(2), alpha=torch.tensor(3.0)), lambda: LoRA(2, 3.0)),
    (lambda: LoRA(2, train=["B"], rank_stabilized=np.True_), lambda: LoRA(2, train=("B",), rank_stabilized=True)),
    (lambda: LoRA(2, layers=np.array([0, 1])), lambda: LoRA(2, layers=(0, 1))),
    (lambda: peft.PromptTuning(2, init_tokens=torch.tensor([3, 4])), lambda: peft.PromptTuning(2, init_tokens=(3, 4))),
    (lambda: peft.PrefixTuning(np.int32(2), gated=np.True_), lambda: peft.PrefixTuning(2, gated=True)),
]  # fmt: skip


@pytest.mark.parametrize("given, plain", NUMBERS)
def test_numbers_of_numpy_and_torch_become_plain_ones(unchecked, decoder, tmp_path, given, plain):
    model = peft.attach(decoder(), given(), seed=np.int64(3), train_also=(np.str_("norm"),))
    peft.save(model, tmp_path / "file")
    assert repr(peft.attached(model)) == repr(peft.attached(peft.attach(decoder(), plain(), 3, ("norm",))))
    assert torch.equal(outputs(peft.load(decoder(), tmp_path / "file")), outputs(model))


ODD = [
    lambda: LoRA(rank=2.0), lambda: LoRA(rank=True), lambda: LoRA(rank=2, targets=(1,)), lambda: LoRA(rank=None),
    lambda: LoRA(rank=2, rank_stabilized=1), lambda: LoRA(rank=2, alpha=True), lambda: LoRA(rank=2, layers=({},)),
    lambda: peft.BottleneckAdapter(bottleneck=2.5),
]  # fmt: skip


@pytest.mark.parametrize("recipe", ODD)
def test_what_a_file_could_not_hold_is_refused(unchecked, recipe):
    with pytest.raises(ValueError, match="must be"):
        recipe()


@pytest.mark.parametrize("seed", [None, 1.5, "1", 2**64, np.float64(1)])
def test_what_is_no_seed_is_refused(unchecked, decoder, seed):
    model = decoder()
    before = fingerprint(model)
    with pytest.raises((TypeError, ValueError), match=r"integer|Overflow"):
        peft.attach(model, QUERY, seed=seed)
    assert_same(before, fingerprint(model))


# Files that ask for more than they hold

HUGE = 10**9
VALUES = [0, -1, 7, HUGE, 10**30, 1.5, -1.5, 1e308, float("nan"), float("inf"), True, None, "x", "", [], [1], ["a"],
          [[]], [HUGE], [None], {}, {"a": 1}]  # fmt: skip


def hostile(decoder, path, recipe, changes):
    """A file with a sound checksum whose recipe asks for something else than its tensors are."""
    if not path.exists():
        peft.save(peft.attach(decoder(), recipe), path)
    tensors, record = contents.read(path)
    record["methods"][0]["recipe"].update(changes)
    bad = path.with_name("bad")
    bad.write_bytes(pack(tensors, record, contents.KEY))
    return bad


TRIED = ("lora", "vera", "prefix mlp", "inside_ffn")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n not in TRIED else []) for n in RECIPES])
def test_any_value_of_any_field_is_read_or_refused(unchecked, decoder, tmp_path, name):
    model, recipe = decoder(), RECIPES[name]
    before = fingerprint(model)
    for field in fields(recipe):
        for value in VALUES:
            path = hostile(decoder, tmp_path / "good", recipe, {field.name: value})
            try:
                peft.load(model, path)
            except ValueError:
                pass
            else:  # what a file may hold of an option that shapes no tensor
                peft.detach(model)
        assert_same(before, fingerprint(model))


@pytest.mark.parametrize("field", ["recipe", "seed", "train_also"])
def test_any_entry_of_a_record_is_read_or_refused(decoder, tmp_path, field):
    path, model = tmp_path / "file", decoder()
    peft.save(peft.attach(decoder(), QUERY), path)
    before, (tensors, record) = fingerprint(model), contents.read(path)
    for value in VALUES:
        methods = [record["methods"][0] | {field: value}]
        path.write_bytes(pack(tensors, record | {"methods": methods}, contents.KEY))
        with contextlib.suppress(ValueError):
            peft.detach(peft.load(model, path))
        assert_same(before, fingerprint(model))


def test_a_record_with_more_or_less_than_is_known_is_refused(decoder, tmp_path):
    path = tmp_path / "file"
    peft.save(peft.attach(decoder(), QUERY), path)
    more = [lambda r: r.update(more=1), lambda r: r["methods"][0].update(more=1), lambda r: r.update(methods=[])]
    for change in more:
        tensors, record = contents.read(path)
        change(record)
        (tmp_path / "bad").write_bytes(pack(tensors, record, contents.KEY))
        with pytest.raises(ValueError, match="not complete"):
            peft.load(decoder(), tmp_path / "bad")


LARGE = {
    "prompt normal": {"length": 10**7}, "prompt": {"length": 10**7}, "prefix kv normal": {"length": 10**7},
    "prefix kv": {"length": 10**7}, "prefix mlp": {"reparameterize": 10**7}, "houlsby": {"bottleneck": 10**7},
    "vera": {"rank": 10**7}, "lora": {"rank": 10**7},
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_small_file_takes_little_memory(decoder, tmp_path, name):
    path = hostile(decoder, tmp_path / "good", RECIPES[name], LARGE[name])
    model, before = decoder(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"larger tensors than|rank|leaves no room"):
        peft.load(model, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@dataclass(frozen=True)
class Roomy(peft.BottleneckAdapter):
    """A recipe of the reader's own, which makes a tensor like another."""

    def wrap(self, name, module, model, generator):
        module.down.weight.new_empty(self.bottleneck, 100).fill_(1.0)
        return super().wrap(name, module, model, generator)


def test_a_small_file_of_a_recipe_of_the_readers_own_takes_little_memory(decoder, tmp_path):
    recipe = Roomy(bottleneck=2, placement="pfeiffer")
    path = hostile(decoder, tmp_path / "good", recipe, {"bottleneck": 10**7})
    model, before = decoder(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="larger tensors than"):
        peft.load(model, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_a_tensor_of_another_kind_is_refused(decoder):
    model = peft.attach(decoder(), QUERY)
    tensors = peft.state_dict(model)
    name = next(iter(tensors))
    with pytest.raises(ValueError, match="complex64; what is attached needs"):
        peft.load_state_dict(model, tensors | {name: tensors[name].to(torch.complex64)})


# Links and modes


@pytest.mark.skipif(os.name == "nt", reason="links and modes of POSIX")
def test_a_link_stays_one_and_a_file_keeps_its_mode(decoder, tmp_path):
    model = peft.attach(decoder(), QUERY)
    real, link, chain = tmp_path / "real", tmp_path / "link", tmp_path / "chain"
    (tmp_path / "below").mkdir()
    link.symlink_to(real)
    chain.symlink_to("link")
    peft.save(model, link)  # of a file that is not there yet
    assert link.is_symlink() and real.is_file()
    real.chmod(0o600)
    train_a_little(model)
    peft.save(model, chain)
    assert chain.is_symlink() and link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert torch.equal(outputs(peft.load(decoder(), real)), outputs(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "chain", "link", "real"]
    with pytest.raises(IsADirectoryError):
        peft.save(model, tmp_path / "below")

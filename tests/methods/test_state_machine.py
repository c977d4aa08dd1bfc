"""Random lives of a model: whatever is done to it in whatever order, a plain book of what should be there agrees.

The book is four things: the base weights, which never change; the list of recipes that are attached; a copy of their
tensors; and whether their updates are merged. From these alone a fresh model is built after every step, and the model
with the long life must compute the same, bit for bit (up to rounding while it is merged).
"""

import copy
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference.method_cases import batch, loss_of, outputs
from reference.random_weights import randomize

import peft
from minitransformer import Transformer, TransformerConfig

STEPS = 2000
RECIPES = {
    "lora": peft.LoRA(rank=2, alpha=3.0),
    "lora up": peft.LoRA(rank=1, targets=("up",), rank_stabilized=True),
    "lora B": peft.LoRA(rank=2, targets=("output",), train=("B",)),
    "dora": peft.DoRA(rank=2, targets=("value", "down")),
    "prefix": peft.PrefixTuning(length=2),
    "gated": peft.PrefixTuning(length=2, gated=True, init="normal"),
    "prefix mlp": peft.PrefixTuning(length=2, reparameterize=3),
    "prompt": peft.PromptTuning(length=2),
    "houlsby": peft.BottleneckAdapter(bottleneck=3),
    "parallel": peft.BottleneckAdapter(bottleneck=3, placement="parallel"),
    "bitfit": peft.BitFit(),
    "ia3": peft.IA3(),
    "ln_tuning": peft.LNTuning(),
}
# Recipes of one line are of one kind at a common place, so a second one of them is refused.
RIVALS = (
    {"lora", "dora"},
    {"prefix", "gated", "prefix mlp", "folded"},
    {"prompt"},
    {"houlsby", "parallel"},
    {"lora up"},
    {"lora B"},
    {"bitfit"},
    {"ia3"},
    {"ln_tuning"},
)
MERGEABLE = {"lora", "lora up", "lora B", "dora"}
taken_steps = itertools.count()


class Life(RuleBasedStateMachine):
    """One model, and the book about it."""

    @initialize(
        causal=st.booleans(), norm=st.sampled_from(["pre", "post"]), d_model=st.sampled_from([4, 8]),
        n_layers=st.integers(1, 2), training=st.booleans(),
    )  # fmt: skip
    def birth(self, causal, norm, d_model, n_layers, training):
        sizes = {"vocab_size": 23, "max_len": 10, "n_heads": 2, "d_ff": 6}
        config = TransformerConfig(causal=causal, norm=norm, d_model=d_model, n_layers=n_layers, **sizes)
        self.base = randomize(Transformer(config, seed=0)).train(training)
        self.model = copy.deepcopy(self.base)
        self.plain = outputs(self.base)
        self.names: list[str] = []
        self.seeds: list[int] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.merged: set[str] = set()
        self.folder = tempfile.TemporaryDirectory()
        self.files: dict[str, tuple] = {}
        self.left_behind: list[tuple] = []

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def recipe(self, name):
        return RECIPES["prefix" if name == "folded" else name]

    def expect(self, message, operation):
        with pytest.raises(ValueError, match=message):
            operation()

    @rule(name=st.sampled_from(sorted(RECIPES)), seed=st.integers(0, 9))
    def attach(self, name, seed):
        if any(name in rivals and rivals & set(self.names) for rivals in RIVALS):
            self.expect("already", lambda: peft.attach(self.model, RECIPES[name], seed=seed))
            return
        peft.attach(self.model, RECIPES[name], seed=seed)
        self.names.append(name)
        self.seeds.append(seed)
        self.tensors = peft.state_dict(self.model) | self.tensors

    @precondition(lambda self: self.names and not self.merged)
    @rule()
    def train_a_step(self):
        before = peft.state_dict(self.model)
        loss_of(self.model).backward()
        trained = peft.trainable_parameters(self.model)
        with torch.no_grad():
            for p in trained.values():
                p -= 0.1 * p.grad / (1 + p.grad.norm())
        assert all(p.grad is None for p in self.model.parameters() if not p.requires_grad)
        self.model.zero_grad(set_to_none=True)
        self.tensors = peft.state_dict(self.model)
        assert all(torch.equal(self.tensors[name], before[name]) for name in before.keys() - trained.keys())

    @rule()
    def merge(self):
        if self.merged:
            self.expect("merged already", lambda: peft.merge(self.model))
        elif not MERGEABLE & set(self.names):
            self.expect("no LoRA", lambda: peft.merge(self.model))
        else:
            peft.merge(self.model)
            self.merged = MERGEABLE & set(self.names)

    @rule()
    def unmerge(self):
        if self.merged:
            peft.unmerge(self.model)
            self.merged = set()
        else:
            self.expect("nothing is merged|no LoRA", lambda: peft.unmerge(self.model))

    @precondition(lambda self: self.names)
    @rule(nested=st.booleans())
    def disable(self, nested):
        before = outputs(self.model)
        with peft.disabled(self.model):
            assert torch.equal(outputs(self.model), self.plain)
            if nested:
                with peft.disabled(self.model):
                    assert torch.equal(outputs(self.model), self.plain)
        assert torch.equal(outputs(self.model), before)

    @rule(file=st.sampled_from("abc"))
    def save(self, file):
        path = Path(self.folder.name, file)
        if not self.names:
            self.expect("no method is attached", lambda: peft.save(self.model, path))
            return
        peft.save(self.model, path)
        self.files[file] = (list(self.names), list(self.seeds), dict(self.tensors), bool(self.merged))

    @precondition(lambda self: self.files)
    @rule(file=st.sampled_from("abc"), first_detach=st.booleans())
    def load(self, file, first_detach):
        if first_detach and self.names:
            self.detach()
        path = Path(self.folder.name, file)
        if file not in self.files:
            with pytest.raises(FileNotFoundError):
                peft.load(self.model, path)
            return
        names, seeds, tensors, merged = self.files[file]
        if self.names and peft.attached(self.model) != [self.record(n, s) for n, s in zip(names, seeds, strict=True)]:
            self.expect("other methods are attached", lambda: peft.load(self.model, path))
        elif self.names and self.merged:
            self.expect("merged update", lambda: peft.load(self.model, path))
        elif self.names:
            peft.load(self.model, path)
            self.tensors = dict(tensors)
            self.merged = MERGEABLE & set(names) if merged else set()
        else:
            peft.load(self.model, path)
            self.names, self.seeds, self.tensors = list(names), list(seeds), dict(tensors)
            self.merged = MERGEABLE & set(names) if merged else set()

    def record(self, name, seed):
        return type(peft.attached(self.model)[0])(self.recipe(name), seed)

    @rule()
    def detach(self):
        if not self.names:
            self.expect("no method is attached", lambda: peft.detach(self.model))
            return
        peft.detach(self.model)
        self.names, self.seeds, self.tensors, self.merged = [], [], {}, set()
        assert torch.equal(outputs(self.model), self.plain)
        assert self.model.state_dict().keys() == self.base.state_dict().keys()

    @rule()
    def move_into_a_copy(self):
        self.left_behind.append((self.model, outputs(self.model)))
        self.model = copy.deepcopy(self.model)

    @precondition(lambda self: "prefix mlp" in self.names)
    @rule()
    def fold(self):
        before = outputs(self.model)
        peft.fold(self.model)
        torch.testing.assert_close(outputs(self.model), before, rtol=1e-5, atol=1e-5)
        self.names[self.names.index("prefix mlp")] = "folded"
        self.tensors = peft.state_dict(self.model)

    @precondition(lambda self: self.names and set(self.names) <= MERGEABLE)
    @rule()
    def make_a_merged_copy(self):
        twin = peft.merged_copy(self.model)
        torch.testing.assert_close(outputs(twin), outputs(self.model), rtol=1e-4, atol=1e-5)
        assert twin.state_dict().keys() == self.base.state_dict().keys()

    @rule(training=st.booleans())
    def switch_mode(self, training):
        self.model.train(training)

    @invariant()
    def the_book_agrees(self):
        if not hasattr(self, "model"):
            return
        next(taken_steps)
        assert [(entry.method, entry.seed) for entry in peft.attached(self.model)] == [
            (self.recipe(name), seed) for name, seed in zip(self.names, self.seeds, strict=True)
        ]
        rebuilt = copy.deepcopy(self.base)
        for name, seed in zip(self.names, self.seeds, strict=True):
            peft.attach(rebuilt, self.recipe(name), seed=seed)
        if self.names:
            peft.load_state_dict(rebuilt, self.tensors)
            found = peft.state_dict(self.model)
            assert found.keys() == self.tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in self.tensors.items())
        if self.merged:
            torch.testing.assert_close(outputs(self.model), outputs(rebuilt), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(outputs(self.model), outputs(rebuilt))
            frozen = peft.sites.named_tensors(self.model)
            assert all(torch.equal(frozen[name], p) for name, p in self.base.named_parameters())
        trained = set(peft.trainable_parameters(self.model))
        assert trained == set(peft.trainable_parameters(rebuilt))
        for model, before in self.left_behind[-2:]:
            assert torch.equal(outputs(model), before)


@pytest.mark.slow
def test_random_lives():
    config = settings(
        max_examples=62, stateful_step_count=40, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Life, settings=config)
    taken = next(taken_steps)
    assert taken >= STEPS, f"only {taken} steps were taken"


def test_the_batch_of_these_tests_is_padded():
    assert not batch()[1].all()

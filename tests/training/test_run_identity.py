"""A run goes on from its own file only: of two runs that differ in one thing, neither takes the other's file."""

import dataclasses
import functools
import io
import itertools
import logging
import random
import subprocess
import sys
from pathlib import Path
from types import MethodType, ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import peft
from minitransformer import SequenceClassifier, Transformer, TransformerConfig
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import Score, answer_loss, fit, label_loss
from minitransformer.training.identity import leaves


def mark(value):
    """All that it is known by."""
    return leaves("", value, {})


CONFIG = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24, dropout=0.2)
LORA = peft.LoRA(rank=2, alpha=4, dropout=0.3)
TEMPERATURE = 1.0
LOG = logging.getLogger(__name__)


def data(seed: int = 1, n: int = 20) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(23, (n, 6), generator=generator)
    mask = torch.arange(6) < torch.randint(2, 7, (n, 1), generator=generator)
    return Dataset(tokens, mask, tokens[:, 0])


@dataclasses.dataclass(frozen=True)
class WithKinds(Dataset):
    kinds: tuple[str, ...] = ()


def with_kinds(kind: str) -> WithKinds:
    rows = data()
    return WithKinds(rows.tokens, rows.padding_mask, rows.targets, (kind,) * 20)


def scaled(model: nn.Module, batch: Dataset, factor: float = 1.0, also=None) -> Score:
    score = answer_loss(model, batch)
    LOG.debug("a logger has no value")
    return Score(score.loss * factor * TEMPERATURE, score.correct, score.count)


def scaled_by(factor: float):
    return lambda model, batch: scaled(model, batch, factor)


class Scaled:
    """An objective that is an object."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, model: nn.Module, batch: Dataset) -> Score:
        return scaled(model, batch, self.factor)


class OtherwiseScaled(Scaled):
    def __call__(self, model: nn.Module, batch: Dataset) -> Score:
        return scaled(model, batch, self.factor / 2)


code = 1.0


class Items:
    """An objective whose attributes have the names of what else a value is made of."""

    def __init__(self, items):
        self.items = self.pairs = self.bases = items

    def __call__(self, model: nn.Module, batch: Dataset) -> Score:
        return scaled(model, batch, self.items[0] * code)


class Bag(list):
    """A list with an attribute."""


def with_bag(*values, factor=1.0):
    bag = Bag(values)
    bag.factor = factor
    return functools.partial(scaled, also=bag)


def rows_at(rows: Dataset, size: int, step: int) -> Dataset:
    return rows.rows(slice(step % size, step % size + 8))


def built(recipe=LORA, config=CONFIG, base=5, seed=6, train_also=(), second=None, change=None, classes=0, pool="mean"):
    model = Transformer(config, seed=base)
    model = SequenceClassifier(model, classes, pool=pool, seed=base) if classes else model
    if recipe is not None:
        peft.attach(model, recipe, seed=seed, train_also=train_also)
    if second is not None:
        peft.attach(model, second, seed=seed)
    if change is not None:
        change(model)
    return model


def run(path, model=None, optimizer=None, train=None, validation=None, **options):
    """Six steps, of which the first four are done when it stops, if `stop` says so."""
    model = built(**(model or {}))
    options = {"steps": 6, "batch_size": 8, "learning_rate": 0.02, "validate_every": 2} | options
    if optimizer is not None:
        options |= {"optimizer": optimizer(model), "learning_rate": None}
    train = data() if train is None else train
    options["batch_size"] = None if callable(train) else options["batch_size"]
    validation = data(2) if validation is None else validation
    history = fit(model, train, validation, checkpoint=path, every=2, progress=False, **options)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, history.loss


def adamw(**options):
    return lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, **options)


def sgd(momentum):
    return lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=momentum)


def warm(model):
    """An optimizer that remembers another run."""
    optimizer = sgd(0.9)(model)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    answer_loss(model, data()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for p, value in zip(optimizer.param_groups[0]["params"], before, strict=True):
            p.copy_(value)
    return optimizer


def grouped(first):
    """Two groups with the same rates, of which one or the other holds A."""

    def make(model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [[p for name, p in trained.items() if name.endswith(letter)] for letter in first]
        return torch.optim.SGD([{"params": group} for group in groups], lr=0.02)

    return make


def moved(model):
    """One number of what is trained starts elsewhere."""
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0].add_(1e-3)


def frozen_moved(model):
    with torch.no_grad():
        model.blocks[0].feedforward.up.weight[0, 0] += 1e-3


def more_dropout(model):
    model.blocks[0].attention.query.base = nn.Sequential(model.blocks[0].attention.query.base, nn.Dropout(0.5))


def hooked(model):
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 1.1)


def buffered(value):
    return lambda model: model.register_buffer("kept", torch.tensor(value))


def recipe(**changes):
    return {"model": {"recipe": dataclasses.replace(LORA, **changes)}}


def config(**changes):
    return {"model": {"config": dataclasses.replace(CONFIG, **changes)}}


PART = functools.partial
HEADED = {"objective": label_loss, "model": {"classes": 23, "train_also": ("head",)}}
PLAIN = {}
# what is changed: the run, the run that differs from it in this alone, and what the refusal names
MUTATIONS = {
    "alpha": (PLAIN, recipe(alpha=400), "method.alpha"),
    "rank": (PLAIN, recipe(rank=3), "list of trained tensors"),
    "the method's dropout": (PLAIN, recipe(dropout=0.0), "method.dropout"),
    "rsLoRA": (PLAIN, recipe(rank_stabilized=True), "method.rank_stabilized"),
    "another method": (PLAIN, {"model": {"recipe": peft.DoRA(rank=2, alpha=4, dropout=0.3)}}, "query.recipe"),
    "a second method": (PLAIN, {"model": {"second": peft.IA3()}}, "list of trained tensors"),
    "no method": (PLAIN, {"model": {"recipe": None}}, "list of trained tensors"),
    "seed of attach": (PLAIN, {"model": {"seed": 7}}, "peft_record.seed"),
    "start": (PLAIN, {"model": {"change": moved}}, "start of the trained tensors"),
    "a buffer": ({"model": {"change": buffered(1.0)}}, {"model": {"change": buffered(2.0)}}, "start of"),
    "base weights": (PLAIN, {"model": {"base": 8}}, "frozen base"),
    "one weight of the base": (PLAIN, {"model": {"change": frozen_moved}}, "frozen base"),
    "n_heads": (PLAIN, config(n_heads=4), "config.n_heads"),
    "dropout of the base": (PLAIN, config(dropout=0.1), "config.dropout"),
    "causal": (PLAIN, config(causal=False), "config.causal"),
    "logit_scale": (PLAIN, config(logit_scale=0.5), "logit_scale"),
    "a class among the modules": (PLAIN, {"model": {"change": more_dropout}}, "blocks.0.attention.query.base"),
    "a hook": (PLAIN, {"model": {"change": hooked}}, "_forward_hooks"),
    "train_also": (HEADED, HEADED | {"model": {"classes": 23, "train_also": ("head", "norm")}}, "train_also"),
    "pool": (HEADED, HEADED | {"model": {"classes": 23, "train_also": ("head",), "pool": "first"}}, "pool"),
    "training data": (PLAIN, {"train": data(3)}, "train"),
    "order of the data": (PLAIN, {"train": data().rows(torch.arange(20).flip(0))}, "train"),
    "one label": (PLAIN, {"train": Dataset(data().tokens, data().padding_mask, data(3).targets)}, "train"),
    "another field of the data": ({"train": with_kinds("a")}, {"train": with_kinds("b")}, "train"),
    "validation data": (PLAIN, {"validation": data(4)}, "validation"),
    "a function as data": ({"train": PART(rows_at, data(), 5)}, {"train": PART(rows_at, data(), 6)}, "train"),
    "objective": (PLAIN, {"objective": scaled}, "objective"),
    "argument of a partial": ({"objective": PART(scaled, factor=1.0)}, {"objective": PART(scaled, factor=2.0)}, "obj"),
    "tensor of a partial": (
        {"objective": PART(scaled, also=torch.ones(2))}, {"objective": PART(scaled, also=torch.zeros(2))}, "objective",
    ),
    "closure": ({"objective": scaled_by(1.0)}, {"objective": scaled_by(2.0)}, "objective"),
    "state of an object": ({"objective": Scaled(1.0)}, {"objective": Scaled(2.0)}, "objective"),
    "attributes of an object": ({"objective": Items([1.0])}, {"objective": Items([2.0])}, "objective"),
    "items of a list": ({"objective": with_bag(1)}, {"objective": with_bag(2)}, "objective"),
    "attribute of a list": ({"objective": with_bag(1)}, {"objective": with_bag(1, factor=2)}, "objective"),
    "code of an object": ({"objective": Scaled(1.0)}, {"objective": OtherwiseScaled(1.0)}, "objective"),
    "constant of a lambda": ({"schedule": lambda step: 0.5}, {"schedule": lambda step: 0.25}, "schedule"),
    "name in a lambda": ({"schedule": lambda i: max(0.5, 1.0)}, {"schedule": lambda i: min(0.5, 1.0)}, "schedule"),
    "schedule": (PLAIN, {"schedule": "linear"}, "schedule"),
    "warmup": (PLAIN, {"warmup": 2}, "warmup"),
    "clip": (PLAIN, {"clip": 0.5}, "clip"),
    "steps": (PLAIN, {"steps": 8}, "steps"),
    "batch size": (PLAIN, {"batch_size": 4}, "batch_size"),
    "seed": (PLAIN, {"seed": 1}, "seed"),
    "validate_every": (PLAIN, {"validate_every": 3}, "validate_every"),
    "learning rate": (PLAIN, {"learning_rate": 0.03}, "lr"),
    "weight decay": (PLAIN, {"weight_decay": 0.1}, "weight_decay"),
    "betas": (PLAIN, {"betas": (0.9, 0.99)}, "betas"),
    "class of the optimizer": ({"optimizer": adamw()}, {"optimizer": sgd(0.0)}, "optimizer"),
    "momentum": ({"optimizer": sgd(0.0)}, {"optimizer": sgd(0.9)}, "momentum"),
    "start of the optimizer": ({"optimizer": sgd(0.9)}, {"optimizer": warm}, "start of the optimizer"),
    "groups of the optimizer": ({"optimizer": grouped("AB")}, {"optimizer": grouped("BA")}, "params"),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped():
    """The file of each run after four of its six steps."""
    import minitransformer.training.loop as training

    files = {}

    def killed(*arguments, step=training.training_step):
        if arguments[6] == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    def file_of(options, path):
        if id(options) not in files:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(training, "training_step", killed)
                run(path, **options)
            files[id(options)] = path.read_bytes()
        path.write_bytes(files[id(options)])
        return path

    return file_of


@pytest.mark.parametrize("name", MUTATIONS)
def test_another_run_is_refused_by_name_and_nothing_changes(name, stopped, tmp_path):
    first, second, message = MUTATIONS[name]
    path = stopped(first, tmp_path / "run")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="belongs to a run with another") as refusal:
        run(path, **second)
    assert message in str(refusal.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["alpha", "train_also", "a function as data", "closure", "start of the optimizer"])
def test_the_same_run_goes_on_to_the_same_bits(name, stopped, tmp_path):
    first, _, _ = MUTATIONS[name]
    expected, losses = run(tmp_path / "whole", **first)
    found, found_losses = run(stopped(first, tmp_path / "run"), **first)
    assert found_losses == losses
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_global_that_an_objective_reads_belongs_to_the_run(tmp_path, monkeypatch):
    run(tmp_path / "run", objective=scaled)
    monkeypatch.setitem(scaled.__globals__, "TEMPERATURE", 2.0)
    with pytest.raises(ValueError, match="another objective"):
        run(tmp_path / "run", objective=scaled)


class Settings:
    """Values that a function reads; a class of the reader's own."""

    factor = 1.0
    parts: ClassVar[dict] = {"loss": [1.0, 1.0]}

    @staticmethod
    def half(value):
        return value / 2


class Halved(nn.Module):
    """A module of the reader's own, with an attribute that PyTorch does not know."""

    def __init__(self, base):
        super().__init__()
        self.base, self._factor = base, 0.5

    def forward(self, x):
        return self.base(x) * self._factor


settings = ModuleType("settings")
settings.factor, settings.unused = 1.0, 1.0
WEIGHTS = {"of": [1.0, 2.0]}
KNOWN = {1, 2}


def reads_a_dict(model: nn.Module, batch: Dataset) -> Score:
    return scaled(model, batch, WEIGHTS["of"][0] + len(KNOWN))


def reads_a_class(model: nn.Module, batch: Dataset) -> Score:
    return scaled(model, batch, Settings.half(Settings.factor) * Settings.parts["loss"][0])


def reads_a_python_module(model: nn.Module, batch: Dataset) -> Score:
    return scaled(model, batch, settings.factor)


def reads_its_own_attribute(model: nn.Module, batch: Dataset) -> Score:
    return scaled(model, batch, reads_its_own_attribute.factor)


def halved(model):
    model.blocks[0].feedforward = Halved(model.blocks[0].feedforward)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"objective": reads_a_dict}, lambda patch: patch.setitem(WEIGHTS, "of", [1.0, 3.0])),
        ({"objective": reads_a_dict}, lambda patch: patch.setitem(globals(), "KNOWN", {1, 3})),
        ({"objective": reads_a_class}, lambda patch: patch.setattr(Settings, "factor", 2.0)),
        ({"objective": reads_a_class}, lambda patch: patch.setattr(Settings, "parts", {"loss": [1.0, 2.0]})),
        ({"objective": reads_a_class}, lambda patch: patch.setattr(Settings, "half", staticmethod(lambda value: 2))),
        ({"objective": Items([1.0])}, lambda patch: patch.setitem(globals(), "code", 2.0)),
        ({"objective": Items([1.0])}, lambda patch: patch.setattr(Items, "__call__", scaled)),
        ({"objective": reads_a_python_module}, lambda patch: patch.setattr(settings, "factor", 2.0)),
        ({"objective": reads_its_own_attribute}, lambda patch: patch.setattr(reads_its_own_attribute, "factor", 2.0)),
        ({"model": {"change": halved}}, lambda patch: patch.setattr(Halved, "forward", lambda self, x: self.base(x))),
        ({"model": {"change": halved}}, lambda patch: patch.setattr(Halved, "half", property(lambda self: 0.5), False)),
        ({"objective": Scaled(1.0).__call__}, lambda patch: patch.setattr(Scaled, "__call__", scaled_by(2.0))),
    ],
)  # fmt: skip
def test_what_an_objective_or_a_model_refers_to_belongs_to_the_run(tmp_path, monkeypatch, options, change):
    reads_its_own_attribute.factor = 1.0
    run(tmp_path / "run", **options)
    run(tmp_path / "run", **options)
    change(monkeypatch)
    with pytest.raises(ValueError, match=r"belongs to a run with another (objective|model|start)"):
        run(tmp_path / "run", **options)


def test_what_nothing_refers_to_does_not_count(tmp_path, monkeypatch):
    run(tmp_path / "run", objective=reads_a_python_module)
    monkeypatch.setattr(settings, "unused", 2.0)
    monkeypatch.setattr(torch, "a_note", "of a library", raising=False)
    run(tmp_path / "run", objective=reads_a_python_module)


def test_a_forward_that_was_patched_belongs_to_the_run(tmp_path):
    def doubled(self, *arguments):
        return type(self).forward(self, *arguments) * 2

    def patched(model):
        up = model.blocks[0].feedforward.up
        up.forward = MethodType(doubled, up)

    run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"blocks.0.feedforward.up.forward"):
        run(tmp_path / "run", model={"change": patched})


def test_a_global_of_the_name_of_an_attribute_does_not_count(tmp_path, monkeypatch):
    run(tmp_path / "run", objective=scaled)
    monkeypatch.setitem(scaled.__globals__, "loss", torch.ones(3))
    run(tmp_path / "run", objective=scaled)


DRAWN = random.Random(0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({"train": PART(lambda step, draws: data(), draws=draws)}, "train.*draws") for draws in (
            random.Random(0), np.random.default_rng(0), torch.Generator(), itertools.count(), io.StringIO())),
        ({"train": lambda step: data(DRAWN.randrange(9))}, "train.DRAWN is a Random"),
        ({"train": lambda step: data(random.randrange(9))}, "train.random.randrange.* is a Random"),
        ({"train": lambda step: data(np.random.randint(9))}, "train.np.random.randint.* is a RandomState"),  # noqa: NPY002
        ({"model": {"change": lambda model: setattr(model, "draws", DRAWN)}}, "model.draws is a Random"),
    ],
)  # fmt: skip
def test_what_goes_on_where_it_was_left_is_refused(tmp_path, options, name):
    with pytest.raises(ValueError, match=rf"depends on .*{name}.* goes on where it was left"):
        run(tmp_path / "run", **options)


def test_what_starts_anew_in_each_step_is_known(tmp_path):
    run(tmp_path / "run", train=lambda step: data(random.Random(step).randrange(9)))
    run(tmp_path / "other", train=lambda step: data(np.random.default_rng(step).integers(9).item()))


def test_autocast_belongs_to_the_run(tmp_path):
    run(tmp_path / "run")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="another autocast"):
        run(tmp_path / "run")


def test_the_weights_of_a_teacher_belong_to_the_objective():
    def distilled(teacher):
        return lambda model, batch: Score(teacher(batch.tokens).sum() * answer_loss(model, batch).loss, 0, 1)

    teacher = Transformer(CONFIG, seed=1)
    before = mark(distilled(teacher))
    assert mark(distilled(Transformer(CONFIG, seed=1))) == before
    frozen_moved(teacher)
    assert mark(distilled(teacher)) != before


def test_what_no_process_can_know_again_is_refused_by_name(tmp_path):
    rows = iter([data()] * 9)
    stream = (next(rows) for _ in range(9))
    with pytest.raises(ValueError, match=r"train depends on what no other process can know again .*generator"):
        run(tmp_path / "run", train=lambda step: next(stream))
    assert not (tmp_path / "run").exists()
    fit(built(), lambda step: next(stream), steps=2, progress=False)


def test_the_same_call_on_the_finished_model_returns_at_once(tmp_path):
    model = built()
    options = {"steps": 4, "validate_every": 1, "checkpoint": tmp_path / "run", "progress": False}
    first = fit(model, data(), data(2), **options)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert fit(model, data(), data(2), **options) == first
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


IN_A_PROCESS = """
import sys
sys.path[:0] = sys.argv[1:3]
from functools import partial
import test_run_identity as t
hashed = lambda word: word in {"these", "are", "in", "an", "order", "of", "each", "process"}
values = (t.scaled, t.scaled_by(2.0), t.Scaled(1.0), partial(t.scaled, factor=2), t.with_kinds("a"), hashed, {"a", "b"})
print(*map(t.mark, values), t.mark(t.built()))
"""


@pytest.mark.slow
def test_marks_are_the_same_in_every_process():
    root = Path(__file__).resolve().parents[2]
    folders = [str(root), str(root / "tests" / "training")]
    found = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", IN_A_PROCESS, *folders]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_functions_that_call_each_other_are_known():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n > 0 and even(n - 1)

    assert mark(even) == mark(even) != mark(odd)

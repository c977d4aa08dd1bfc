"""The comparison on the toy tasks: every method, with a learning rate of its own, several seeds.

    python -m peft compare --task sentiment --out notebooks/results
    python -m peft compare --task qa --out notebooks/results

`sweep.py` says how rates are chosen and what is scored when. A choice takes runs as long as the final ones: shorter
ones would favour the higher rate, whatever is best in the end. Batch size, schedule and data order are the
same for all methods.

With `--examples 16` a run sees so few training rows, drawn anew for each seed, in as many steps as before. The rate is
still chosen on the whole validation split, which is generous, to all methods alike.

On top of the methods come a row without any training (zero-shot), and, with `--random-backbone`, the same methods on a
frozen backbone that was never pretrained: what they then reach, they owe to the task alone.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from minitransformer import Transformer
from minitransformer.pretrained import toy_backbone
from minitransformer.tasks import Task, qa_splits, sentiment_splits
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import History, Objective, answer_loss, evaluate, fit, predict, training_step
from peft.attach import attach, attached
from peft.checkpoint import save
from peft.experiments.results import Row
from peft.experiments.sweep import COSTS, KEY, SCORES, Study, identity, measured
from peft.method import Method
from peft.methods.adapter import BottleneckAdapter
from peft.methods.bitfit import BitFit
from peft.methods.dora import DoRA
from peft.methods.ia3 import IA3
from peft.methods.lora import ALL_LINEARS, LoRA
from peft.methods.lora_plus import lora_plus_groups
from peft.methods.prefix import PrefixTuning
from peft.methods.prompt import PromptTuning

TASKS = {"sentiment": sentiment_splits, "qa": qa_splits}


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: a method (None: full fine-tuning), its learning rates, its steps on each task.

    With `ratio`, every B of a LoRA learns that many times as fast as A (LoRA+).
    """

    method: Method | None
    learning_rates: tuple[float, ...]
    steps: dict[str, int]
    ratio: float | None = None


# What learns slowly gets more steps: above all prefixes, on questions whose answer takes two look-ups.
SHORT, MEDIUM = {"sentiment": 300, "qa": 600}, {"sentiment": 300, "qa": 1200}
LONG, HOULSBY = {"sentiment": 1200, "qa": 1200}, {"sentiment": 300, "qa": 2400}
PREFIX, GATED = {"sentiment": 1200, "qa": 2400}, {"sentiment": 600, "qa": 4800}
ENTRIES = {
    "full fine-tuning": Entry(None, (3e-4, 1e-3), MEDIUM),
    "LoRA q,v r=4": Entry(LoRA(rank=4, alpha=8), (2e-3, 5e-3), SHORT),
    "LoRA all r=4": Entry(LoRA(rank=4, alpha=8, targets=ALL_LINEARS), (2e-3, 5e-3), SHORT),
    "LoRA q,v r=4, B only": Entry(LoRA(rank=4, alpha=8, train=("B",)), (5e-3, 2e-2), SHORT),
    "LoRA q,v r=4, A only": Entry(LoRA(rank=4, alpha=8, train=("A",)), (5e-3, 2e-2), SHORT),
    "LoRA+ q,v r=4": Entry(LoRA(rank=4, alpha=8), (1e-3, 2e-3), SHORT, ratio=4.0),
    "rsLoRA q,v r=16": Entry(LoRA(rank=16, alpha=8, rank_stabilized=True), (2e-3, 5e-3), SHORT),
    "DoRA q,v r=4": Entry(DoRA(rank=4, alpha=8), (2e-3, 5e-3), SHORT),
    "Houlsby adapter m=8": Entry(BottleneckAdapter(bottleneck=8, placement="houlsby"), (5e-3, 1e-2), HOULSBY),
    "Pfeiffer adapter m=8": Entry(BottleneckAdapter(bottleneck=8, placement="pfeiffer"), (5e-3, 1e-2), MEDIUM),
    "parallel adapter m=8": Entry(BottleneckAdapter(bottleneck=8, placement="parallel"), (5e-3, 1e-2), MEDIUM),
    "adapter inside FFN m=4": Entry(BottleneckAdapter(bottleneck=4, placement="inside_ffn"), (5e-3, 1e-2), MEDIUM),
    "prefix k,v n=16": Entry(PrefixTuning(length=16), (3e-2, 5e-2), PREFIX),
    "gated prefix k,v n=32": Entry(PrefixTuning(length=32, gated=True), (5e-2, 1e-1), GATED),
    "prefix k,v n=16 by MLP": Entry(PrefixTuning(length=16, reparameterize=64), (1e-3, 3e-3), LONG),
    "prefix hidden n=16": Entry(PrefixTuning(length=16, at="hidden"), (1e-2, 3e-2), PREFIX),
    "soft prompt n=16": Entry(PromptTuning(length=16), (3e-2, 1e-1), PREFIX),
    "BitFit": Entry(BitFit(), (5e-3, 2e-2), MEDIUM),
    "IA3": Entry(IA3(), (1e-2, 5e-2), MEDIUM),
}
RANDOM_BACKBONE = ("LoRA q,v r=4", "LoRA all r=4", "Pfeiffer adapter m=8", "prefix hidden n=16")

COLUMNS = (*KEY, *SCORES, "test_by_kind", *COSTS)


def backbone(kind: str) -> Transformer:
    """The shipped backbone ("pretrained"), or one of its shape with fresh weights ("random")."""
    pretrained = toy_backbone()
    return pretrained if kind == "pretrained" else Transformer(pretrained.config, seed=12345)


def prepared(name: str, seed: int, backbone_kind: str = "pretrained") -> nn.Module:
    """A backbone with the method of that name attached, or wholly trainable for full fine-tuning.

    Raises:
        ValueError: the comparison has no method of that name.
    """
    if name not in ENTRIES:
        raise ValueError(f"the method {name!r} is unknown; choose one of {', '.join(ENTRIES)}")
    model, method = backbone(backbone_kind), ENTRIES[name].method
    return model.requires_grad_(True) if method is None else attach(model, method, seed=seed)


def train(
    name: str,
    task: Task,
    learning_rate: float,
    steps: int,
    seed: int,
    backbone_kind: str = "pretrained",
    progress: bool = True,
    examples: int | None = None,
) -> tuple[nn.Module, History]:
    """One run of the comparison, on all training rows or on so many: the model with its last weights, the history."""
    model, ratio = prepared(name, seed, backbone_kind), ENTRIES[name].ratio
    options = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "progress": progress, "description": name}
    if ratio is not None:
        options["optimizer"] = torch.optim.AdamW(lora_plus_groups(model, learning_rate, ratio), weight_decay=0.0)
    return model, fit(model, task.train if examples is None else fewer(task.train, examples, seed), **options)


def fewer(dataset: Dataset, examples: int, seed: int) -> Dataset:
    """So many of the rows, drawn at random.

    Raises:
        ValueError: less than one, or more than there are.
    """
    if not 1 <= examples <= len(dataset):
        raise ValueError(f"examples={examples}: choose between 1 and the {len(dataset)} that there are")
    return dataset.rows(torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:examples])


def right_on_test(model: nn.Module, task: Task) -> Bool[Tensor, "N"]:
    """Which rows of the test split the model answers rightly."""
    return predict(model, task.test) == task.test.targets


def by_kind(right: Bool[Tensor, "N"], task: Task) -> dict[str, float]:
    """Test accuracy on each kind of row, of the answers that are right."""
    kinds = {kind: torch.tensor([own == kind for own in task.test.kinds]) for kind in task.kinds}
    return {kind: right[chosen].float().mean().item() for kind, chosen in kinds.items()}


def zero_shot(task: Task, backbone_kind: str = "pretrained") -> dict[str, float]:
    """Test accuracy of the backbone as it is: over all words, and restricted to the words that can be an answer."""
    model = backbone(backbone_kind)
    free, restricted = predict(model, task.test), predict(model, task.test, task.answer_ids.tolist())
    right = {"free": free == task.test.targets, "restricted": restricted == task.test.targets}
    return {name: values.float().mean().item() for name, values in right.items()}


def step_seconds(
    models: dict[str, nn.Module], batch: Dataset, objective: Objective = answer_loss, rounds: int = 7
) -> dict[str, float]:
    """Median time of a training step of each model, all on the same batch.

    The models take turns, so that whatever else the machine does in the meantime falls on all of them alike.
    """
    trainable = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(own, lr=1e-5) for name, own in trainable.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            model.train()
            began = time.perf_counter()
            training_step(model, batch, objective, optimizers[name], trainable[name], 1.0, number)
            seconds[name].append(time.perf_counter() - began)
    # The first step of each also makes the optimizer's state.
    return {name: statistics.median(own[1:]) for name, own in seconds.items()}


def file_bytes(model: nn.Module) -> int:
    """Size of what has to be kept: the method's file, or the whole model's weights."""
    if not attached(model):
        return sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "method.safetensors"))
        return Path(folder, "method.safetensors").stat().st_size


def label(task: str, examples: int | None) -> str:
    """What a task is called in the result files: `sentiment`, or with few examples `sentiment_16`."""
    return task if examples is None else f"{task}_{examples}"


def planned(
    name: str, task: str, backbone_kind: str, stage: str, learning_rate: float, seed: int, examples: int | None = None
) -> Row:
    """What identifies a run: the columns of `KEY`, as they stand in the file."""
    entry = ENTRIES[name]
    steps = entry.steps[task]
    return identity(label(task, examples), backbone_kind, name, entry.method, stage, learning_rate, steps, seed)


def finished(key: Row, task: Task, progress: bool = True, examples: int | None = None) -> Row:
    """Do a planned run: the whole row, as it stands in the file. Only a final run reads the test split."""
    rate, steps, seed = float(key["learning_rate"]), int(key["steps"]), int(key["seed"])
    model, history = train(key["method"], task, rate, steps, seed, key["backbone"], progress, examples)
    test, kinds = None, {}
    if key["stage"] == "final":
        right = right_on_test(model, task)
        test, kinds = right.float().mean().item(), by_kind(right, task)
    by_kinds = "; ".join(f"{kind} {value:.4f}" for kind, value in kinds.items())
    validation = evaluate(model, task.validation)
    return key | measured(model, history, validation, test, file_bytes(model)) | {"test_by_kind": by_kinds}


def study(
    task_name: str,
    names: Sequence[str] = tuple(ENTRIES),
    backbone_kind: str = "pretrained",
    progress: bool = True,
    examples: int | None = None,
) -> Study:
    """The sweep over these methods on one toy task."""
    task = TASKS[task_name]()

    def seconds(methods: Sequence[str]) -> dict[str, float]:
        models = {name: prepared(name, 0, backbone_kind) for name in methods}
        return step_seconds(models, task.train.rows(slice(0, 32)).trimmed(), rounds=2)

    return Study(
        columns=COLUMNS,
        rates={name: ENTRIES[name].learning_rates for name in names},
        planned=lambda name, stage, rate, seed: planned(name, task_name, backbone_kind, stage, rate, seed, examples),
        finished=lambda key: finished(key, task, progress, examples),
        step_seconds=seconds,
        backbone=backbone_kind,
    )

"""The runs of a comparison: every method on a task of `tasks.py`, with a learning rate of its own, several seeds.

    python -m peft compare --task qa --out notebooks/results
    python -m peft compare --task rotten_tomatoes --out notebooks/results
    python -m peft compare --task movers --precision bfloat16 --out notebooks/results

`sweep.py` says how rates are chosen and what is scored when. Batch size, schedule and data order are the same for all
methods.

With `--examples 16` a run sees so few training rows, drawn anew for each seed, in as many steps as before. The rate is
still chosen on the whole validation split, which is generous, to all methods alike. With `--random-backbone` the frozen
backbone was never pretrained. With `--precision bfloat16` the products of a training step, and the weights of a frozen
base, have 16 bits; what is trained has 32 in either case. Rows say which (`precision`, and the name of the backbone).
With `--precision nf4` or `q4_1` the frozen linear layers have 4 bits, rounded anew or as the file has them, and the
products 32.

A language model's final run is also asked the first 32 rows of its validation split every few steps: the column
`validation_curve` has the share of right answers at each step, `steps_to_90` the first step with nine in ten.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save as serialize
from torch import Tensor, nn

from minitransformer.files import fingerprint
from minitransformer.heads import SequenceClassifier
from minitransformer.modes import evaluation_mode
from minitransformer.tasks.dataset import Dataset, Task, by_length
from minitransformer.tasks.language.splits import PairTask
from minitransformer.tasks.real.batches import batches_of_like_length
from minitransformer.tasks.real.text import TextTask
from minitransformer.training import History, Objective, answer_loss, evaluate, fit, training_step
from minitransformer.training.distributed import n_processes
from minitransformer.training.objectives import autocasting
from peft.attach import attach, attached, trainable_parameters
from peft.checkpoint import save
from peft.counting import parameter_table
from peft.experiments.results import KEY, Row
from peft.experiments.sweep import Plan, Study, counted
from peft.experiments.tasks import TASKS, Comparison, Entry, methods_on, precision_of
from peft.merging.combine import soup
from peft.methods.lora_plus import lora_plus_groups

NOTED = 32  # validation rows that a language model is asked during a run
ENOUGH = 0.9  # the share of right answers that `steps_to_90` waits for
AnyTask = Task | TextTask | PairTask


def model_for(task: str, name: str, seed: int, backbone: str = "pretrained") -> nn.Module:
    """The model of a task with the method of that name attached.

    Raises:
        ValueError: the comparison of that task has no method of that name.
    """
    comparison = TASKS[task]
    if name not in comparison.entries:
        raise ValueError(f"the method {name!r} is unknown; choose one of {', '.join(comparison.entries)}")
    model, entry = comparison.models[backbone](seed), comparison.entries[name]
    if entry.method is not None:
        return attach(model, entry.method, seed=seed, train_also=comparison.train_also)
    if entry.frozen:
        getattr(model, "transformer", model).requires_grad_(False)
        return model
    return model.float()  # what is trained has 32 bits, whatever its start had


def train(
    task: AnyTask,
    name: str,
    learning_rate: float,
    steps: int,
    seed: int,
    backbone: str = "pretrained",
    examples: int | None = None,
    progress: bool = True,
    note_every: int | None = None,
) -> tuple[nn.Module, History]:
    """One run of a comparison, on all training rows or on so many examples: the trained model, and the history.

    The seed is that of a head, the method's tensors, the order of the data and dropout. 0 steps train nothing. With
    `note_every` the history has a `PairTask`'s validation accuracy at these steps, on the first `NOTED` rows.
    """
    model = model_for(task.name, name, seed, backbone)
    comparison, rows = TASKS[task.name], task.train if examples is None else fewer(task.train, examples, seed)
    entry, size = comparison.entries[name], min(comparison.batch_size, len(rows))
    if steps == 0:
        return model, History()
    learner, data, own = model, rows, {"learning_rate": learning_rate, "batch_size": size}
    if entry.frozen:
        learner = StoredFeatures(model, rows)
        data = learner.rows
    elif comparison.like_length:
        data = batches_of_like_length(rows, own.pop("batch_size"), seed)
    if precision_of(backbone) != torch.float32:
        own["autocast"] = precision_of(backbone)
    looks = History()
    if note_every is not None:
        data = looking(model, task, data, note_every, looks)
    if entry.ratio is not None:
        groups = lora_plus_groups(model, own.pop("learning_rate"), entry.ratio)
        own["optimizer"] = torch.optim.AdamW(groups, weight_decay=0.0)
    history = fit(
        learner, data, steps=steps, objective=comparison.objective, seed=seed, progress=progress, description=name,
        schedule=comparison.schedule, warmup=comparison.warmup, **own,
    )  # fmt: skip
    if note_every is not None:
        look(model, task, steps, looks)
        history.validation_step, history.validation_accuracy = looks.validation_step, looks.validation_accuracy
    return model, history


def looking(
    model: nn.Module, task: PairTask, batch_at: Callable[[int], Dataset], every: int, looks: History
) -> Callable[[int], Dataset]:
    """The same batches; each `every` steps, before the next one, what the model says by then is noted."""

    def batch_after_a_look(step: int) -> Dataset:
        if step and step % every == 0:
            look(model, task, step, looks)
        return batch_at(step)

    return batch_after_a_look


def look(model: nn.Module, task: PairTask, step: int, looks: History) -> None:
    """Note the accuracy after so many steps."""
    looks.note(validation_step=step, validation_accuracy=task.accuracy(model, task.validation.first(NOTED)))


def fewer(dataset: Dataset, examples: int, seed: int) -> Dataset:
    """So many of the rows, drawn at random.

    Raises:
        ValueError: less than one, or more than there are.
    """
    if not 1 <= examples <= len(dataset):
        raise ValueError(f"examples={examples}: choose between 1 and the {len(dataset)} that there are")
    return dataset.rows(torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:examples])


class StoredFeatures(nn.Module):
    """A head on features that were computed once: with everything below it frozen, they never change.

    `rows` stands for the data set: its only "token" is the number of the row.
    """

    def __init__(self, model: SequenceClassifier, dataset: Dataset):
        super().__init__()
        self.head = model.head
        self.features = torch.empty(len(dataset), model.head.in_features)  # [N, d_model]
        with evaluation_mode(model), torch.no_grad():
            for rows in by_length(dataset).split(64):
                part = dataset.rows(rows).trimmed()
                self.features[rows] = model.features(part.tokens, part.padding_mask)
        numbers = torch.arange(len(dataset))[:, None]
        self.rows = Dataset(numbers, torch.ones_like(numbers, dtype=torch.bool), dataset.targets)

    def forward(self, tokens: Int[Tensor, "B 1"], padding_mask: Bool[Tensor, "B 1"]) -> Float[Tensor, "B n_classes"]:
        """The head's scores of the rows with these numbers."""
        return self.head(self.features[tokens[:, 0]])


def mixed(runs: Sequence[tuple[nn.Module, History]], base: nn.Module) -> tuple[nn.Module, History]:
    """The soup of several runs on `base`, with the losses and seconds of all of them, one after the other."""
    history = History(seconds=sum(own.seconds for _, own in runs))
    history.loss = [loss for _, own in runs for loss in own.loss]
    return soup([model for model, _ in runs], base), history


def by_kind(model: nn.Module, task: Task) -> dict[str, float]:
    """Test accuracy on each kind of row."""
    kinds = [kind for kind in task.kinds if kind in task.test.kinds]
    return {kind: evaluate(model, task.test.of_kind(kind))["accuracy"] for kind in kinds}


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
    """Size of the file that keeps what was trained: the method's, or all trained weights where there is none."""
    if not attached(model):
        return len(serialize({name: p.detach() for name, p in trainable_parameters(model).items()}))
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "method.safetensors"))
        return Path(folder, "method.safetensors").stat().st_size


def label(task: str, examples: int | None) -> str:
    """What a task is called in the result files: `sentiment`, or with few examples `sentiment_16`."""
    return task if examples is None else f"{task}_{examples}"


def settings_of(comparison: Comparison, entry: Entry) -> str:
    """How a run is done, with every option of the recipe and of the comparison written out; those of language models
    only where they are not the defaults, which the rows of other comparisons do not name."""
    objective = getattr(comparison.objective, "__qualname__", repr(comparison.objective))
    options = {"objective": objective} | {key: getattr(comparison, key) for key in ("batch_size", "like_length")}
    options |= {"train_also": comparison.train_also}
    options |= {key: getattr(entry, key) for key in ("frozen", "ratio", "members")}
    later = {"schedule": "cosine", "warmup": None, "note_every": None}
    options |= {key: getattr(comparison, key) for key, usual in later.items() if getattr(comparison, key) != usual}
    return "; ".join([repr(entry.method), *(f"{key}={value}" for key, value in options.items())])


def inputs_of(comparison: Comparison, task: AnyTask, backbone: str) -> str:
    """What a run starts from, as digests: the rows of every split, and the base, without what is trained from fresh.

    Of a base that comes from a file of known checksum, that is enough. The rows of a `PairTask` are its tokens, in
    which a tokenizer shows, and its texts.
    """
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    fields = ("tokens", "padding_mask", "targets")
    texts = ""
    if isinstance(task, PairTask):
        texts = repr([own.pairs for own in splits.values()] + [task.max_new_tokens, task.tokenizer.end_id])
    rows = {f"{name}.{key}": getattr(own, key) for name, own in splits.items() for key in fields}
    data = fingerprint(rows, heading=texts)
    if comparison.base is not None:
        return f"data {data[:12]}, base {comparison.base}"
    model = comparison.models[backbone](0)
    fresh = tuple(f"{name}." for name in comparison.train_also)
    frozen = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(fresh)}
    shape = [own.config for own in model.modules() if hasattr(own, "config")]
    shape += [item for item in vars(model).items() if isinstance(item[1], bool | int | float | str)]  # pool, scale
    return f"data {data[:12]}, base {fingerprint(frozen, heading=str(shape))[:12]}"


def planned(
    task: str, name: str, stage: str, learning_rate: float, seed: int, backbone: str, examples: int | None = None,
    inputs: str = "",
) -> Row:  # fmt: skip
    """What identifies a run: the columns of `KEY`, as they stand in the file.

    Without `inputs` there are no `settings` either, as in rows of files that lack both columns.
    """
    comparison = TASKS[task]
    entry = comparison.entries[name]
    steps = entry.steps if entry.choice_steps is None else entry.choice_steps
    if stage == "final":
        steps = entry.steps * entry.members
    recipe = "" if entry.method is None else str(entry.method)
    settings = settings_of(comparison, entry) if inputs else ""
    values = (label(task, examples), backbone, name, recipe, settings, inputs, stage, learning_rate, steps, seed)
    return dict(zip(KEY, map(str, values), strict=True))


def plan(task: str, methods: Sequence[str], backbone: str, examples: int | None = None, inputs: str = "") -> Plan:
    """The runs of these methods on a task, as the table of `tasks.py` is now."""
    rates = {name: TASKS[task].entries[name].learning_rates for name in methods}
    return Plan(rates, lambda *run: planned(task, *run, backbone, examples, inputs))


def current(rows: Sequence[Row], task: str, examples: int | None = None) -> list[Row]:
    """Of the rows of a file those of the task's comparison as it is now, on every backbone, with all seeds.

    The data need not be there, so of the inputs only this is checked: rows of two that would both count are refused.
    Rows that note no inputs count as long as no others of that backbone do.

    Raises:
        ValueError: runs on different data, or on different bases, would be compared.
    """
    seeds = sorted({int(row["seed"]) for row in rows if row["stage"] == "final"})
    noted, methods = sorted({row["inputs"] for row in rows}), list(TASKS[task].entries)
    kept: list[Row] = []
    for backbone in TASKS[task].models:
        plans = {inputs: plan(task, methods, backbone, examples, inputs) for inputs in noted}
        found = {inputs: own for inputs in noted if (own := counted(plans[inputs], rows, seeds))}
        if len(found) > 1:
            found.pop("", None)
        if len(found) > 1:
            counts = "; ".join(f"{inputs}: {len(own)} rows" for inputs, own in sorted(found.items()))
            raise ValueError(
                f"the runs of {label(task, examples)} have several inputs ({counts}): delete the rows of all but one"
            )
        kept += [row for own in found.values() for row in own]
    return kept


def finished(key: Row, task: AnyTask, examples: int | None = None, progress: bool = True) -> Row:
    """Do a planned run: the whole row, as it stands in the file. Only a final run reads the test split."""
    comparison, name, seed, n = TASKS[task.name], key["method"], int(key["seed"]), n_processes()
    rate, final, backbone = float(key["learning_rate"]), key["stage"] == "final", key["backbone"]
    seeds = comparison.entries[name].seeds(seed) if final else [seed]
    steps = int(key["steps"]) // len(seeds)
    note_every = comparison.note_every if final else None
    runs = [train(task, name, rate, steps, own, backbone, examples, progress, note_every) for own in seeds]
    model, history = runs[0] if len(runs) == 1 else mixed(runs, comparison.models[backbone](seeds[0]))
    objective, counted = objective_on(comparison, backbone), parameter_table(model)
    row = key | {
        "trained_parameters": str(counted.trained),
        "share": f"{counted.share:.6f}",
        **scores(model, task, objective, final),
    }
    if isinstance(task, PairTask):
        looks = list(zip(history.validation_step, history.validation_accuracy, strict=True))
        row["validation_curve"] = "; ".join(f"{step} {share:.4f}" for step, share in looks)
        row["steps_to_90"] = str(next((step for step, share in looks if share >= ENOUGH), ""))
        row["precision"] = str(precision_of(backbone)).removeprefix("torch.")
    return row | {
        "seconds_per_step": f"{history.seconds_per_step:.4f}",
        "file_bytes": str(file_bytes(model)),
        "threads": str(torch.get_num_threads()),
        "torch_version": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores" + f", {n} processes" * (n > 1),
    }


def objective_on(comparison: Comparison, backbone: str) -> Objective:
    """What a model on that backbone is asked for, in the precision of its products."""
    dtype = precision_of(backbone)
    return comparison.objective if dtype == torch.float32 else autocasting(comparison.objective, dtype)


def scores(model: nn.Module, task: AnyTask, objective: Objective, final: bool) -> Row:
    """The columns of what a model reached; those of the test are empty unless the run is a final one.

    A language model's accuracy is that of what it says, its loss that of the words of the answers.
    """
    validation, test, kinds = evaluate(model, task.validation, objective), None, {}
    if isinstance(task, PairTask):
        validation["accuracy"] = task.accuracy(model, task.validation)
        if final:
            said = task.said(model, task.test)
            test, kinds = task.texts.accuracy(said, task.test.pairs), task.accuracy_by_kind(said, task.test)
    elif final:
        test = evaluate(model, task.test, objective)["accuracy"]
        kinds = by_kind(model, task) if isinstance(task, Task) else {}
    row = {f"validation_{name}": f"{validation[name]:.4f}" for name in ("loss", "accuracy")}
    row["test_accuracy"] = "" if test is None else f"{test:.4f}"
    if not isinstance(task, TextTask):
        row["test_by_kind"] = "; ".join(f"{kind} {value:.4f}" for kind, value in kinds.items())
    return row


def answers_of(key: Row, comparison: Comparison, task: PairTask) -> int:
    """How many answers a planned run generates."""
    if key["stage"] != "final":
        return len(task.validation)
    looks = -(-int(key["steps"]) // comparison.note_every) if comparison.note_every else 0
    return len(task.validation) + len(task.test) + looks * min(NOTED, len(task.validation))


def study(
    name: str, methods: Sequence[str] | None = None, backbone: str = "pretrained", examples: int | None = None,
    progress: bool = True,
) -> Study:  # fmt: skip
    """The sweep over these methods, by default over all, on the task of that name.

    Raises:
        ValueError: the task has no such method or backbone, not so many examples, or there is no method at all.
    """
    comparison = TASKS[name]
    if backbone not in comparison.models:
        raise ValueError(f"{name} has no {backbone} backbone; it has {', '.join(comparison.models)}")
    there = methods_on(name, backbone)
    methods = there if methods is None else list(methods)
    if not methods or not set(methods) <= set(there):
        raise ValueError(f"methods={methods}: choose some of {'; '.join(there)}")
    task = comparison.splits()
    if examples is not None:
        fewer(task.train, examples, seed=0)

    objective = objective_on(comparison, backbone)

    def seconds(names: Sequence[str]) -> Mapping[str, float]:
        typical = task.train.rows(by_length(task.train)[len(task.train) // 2 :][: comparison.batch_size]).trimmed()
        quick = {own: 0.0 for own in names if comparison.entries[own].frozen}
        timed = [own for own in names if own not in quick]
        if isinstance(task, PairTask):  # one after the other: several of them would not fit into memory
            for own in timed:
                quick |= step_seconds({own: model_for(name, own, 0, backbone)}, typical, objective, rounds=1)
            return quick
        models = {own: model_for(name, own, 0, backbone) for own in timed}
        return quick | step_seconds(models, typical, objective, rounds=1)

    @cache
    def seconds_per_answer() -> float:
        """Without a method: it says the most, since it does not know when to stop."""
        model, some = comparison.models[backbone](0), task.validation.first(NOTED)
        began = time.perf_counter()
        task.said(model, some)
        return (time.perf_counter() - began) / len(some)

    def scoring(key: Row) -> float:
        return answers_of(key, comparison, task) * seconds_per_answer() if isinstance(task, PairTask) else 0.0

    own = plan(name, methods, backbone, examples, inputs_of(comparison, task, backbone))
    return Study(own.rates, own.planned, lambda key: finished(key, task, examples, progress), seconds, scoring)

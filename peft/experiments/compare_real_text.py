"""The comparison on real text: every method on MiniLM, on a task of `peft/experiments/real_tasks.py`.

    python -m peft compare --task rotten_tomatoes --out notebooks/results

`sweep.py` says how rates are chosen and what is scored when: here by short runs, on the validation split. The
sweep of one task takes hours on one free thread.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save as serialize
from torch import Tensor, nn

from minitransformer.generation import evaluation_mode
from minitransformer.heads import SequenceClassifier
from minitransformer.tasks.dataset import Dataset, by_length
from minitransformer.tasks.real.batches import batches_of_like_length
from minitransformer.tasks.real.text import TextTask
from minitransformer.training import History, evaluate, fit, label_loss
from peft.attach import attached, trainable_parameters
from peft.experiments import compare
from peft.experiments.real_tasks import HEAD, TASKS, model_for
from peft.experiments.results import Row
from peft.experiments.sweep import KEY, MEASURED, Study, identity, measured
from peft.merging.soup import soup

BACKBONE = "pretrained"
COLUMNS = (*KEY, *MEASURED)


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


def train(
    name: str,
    learning_rate: float,
    task: TextTask,
    epochs: int,
    seed: int = 1,
    progress: bool = True,
    model: nn.Module | None = None,
) -> tuple[nn.Module, History]:
    """Train one method of a task's comparison; the last weights are kept.

    Args:
        name: of the method, a key of the task's entries.
        learning_rate: peak of the schedule.
        task: what its `splits` give.
        epochs: walks over the training rows; 0 trains nothing.
        seed: of the head, the method's tensors, the order of the data and dropout.
        progress: show a bar.
        model: of `model_for(task.name, name, seed)`; made here if left out.

    Returns:
        The model, trained, and the history of the run.
    """
    model = model_for(task.name, name, seed) if model is None else model
    if epochs == 0:
        return model, History()
    batch_size = TASKS[task.name].batch_size
    learner, batches = model, batches_of_like_length(task.train, batch_size, seed)
    if name == HEAD:
        learner = StoredFeatures(model, task.train)
        batches = learner.rows
    history = fit(
        learner,
        batches,
        steps=epochs * steps_in_an_epoch(task),
        learning_rate=learning_rate,
        batch_size=batch_size,
        objective=label_loss,
        seed=seed,
        progress=progress,
        description=name,
    )
    return model, history


def train_soup(
    name: str, learning_rate: float, task: TextTask, epochs: int, seeds: Sequence[int], progress: bool = True
) -> tuple[nn.Module, History]:
    """Train one model for each seed, and average them; the history is that of all their steps.

    Returns:
        A fresh model with the mean of the LoRAs attached, and the losses and seconds of all runs, one after the other.
    """
    runs = [train(name, learning_rate, task, epochs, seed, progress) for seed in seeds]
    history = History(seconds=sum(own.seconds for _, own in runs))
    history.loss = [loss for _, own in runs for loss in own.loss]
    return soup([model for model, _ in runs], TASKS[task.name].model(seeds[0])), history


def steps_in_an_epoch(task: TextTask) -> int:
    """How many whole batches the training rows fill."""
    return len(task.train) // TASKS[task.name].batch_size


def score(model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Loss and accuracy on a split."""
    return evaluate(model, dataset, objective=label_loss)


def file_bytes(model: nn.Module) -> int:
    """Size of the file that keeps what was trained: the method's, or all trained weights where there is none."""
    if attached(model):
        return compare.file_bytes(model)
    return len(serialize({name: p.detach() for name, p in trainable_parameters(model).items()}))


def planned(name: str, stage: str, learning_rate: float, seed: int, task: TextTask) -> Row:
    """What identifies a run: the columns of `KEY`, as they stand in the file."""
    entry = TASKS[task.name].entries[name]
    epochs = entry.epochs * entry.members if stage == "final" else entry.choice_epochs
    steps = epochs * steps_in_an_epoch(task)
    return identity(task.name, BACKBONE, name, entry.method, stage, learning_rate, steps, seed)


def finished(key: Row, task: TextTask, progress: bool = True) -> Row:
    """Do a planned run: the whole row, as it stands in the file. Only a final run reads the test split."""
    name, entry = key["method"], TASKS[task.name].entries[key["method"]]
    rate, seed = float(key["learning_rate"]), int(key["seed"])
    if key["stage"] == "final" and entry.members > 1:
        model, history = train_soup(name, rate, task, entry.epochs, entry.seeds(seed), progress)
    else:
        model, history = train(name, rate, task, int(key["steps"]) // steps_in_an_epoch(task), seed, progress)
    test = score(model, task.test)["accuracy"] if key["stage"] == "final" else None
    return key | measured(model, history, score(model, task.validation), test, file_bytes(model))


def study(task_name: str, names: Sequence[str] = (), progress: bool = True) -> Study:
    """The sweep over these methods, or over all, on a task of `peft.experiments.real_tasks`."""
    setting = TASKS[task_name]
    task = setting.splits()

    def seconds(methods: Sequence[str]) -> dict[str, float]:
        typical = task.train.rows(by_length(task.train)[len(task.train) // 2 :][: setting.batch_size]).trimmed()
        quick = {name: 0.0 for name in methods if name == HEAD or setting.entries[name].epochs == 0}
        models = {name: model_for(task_name, name, seed=0) for name in methods if name not in quick}
        return quick | compare.step_seconds(models, typical, label_loss, rounds=1)

    return Study(
        columns=COLUMNS,
        rates={name: setting.entries[name].learning_rates for name in names or setting.entries},
        planned=lambda name, stage, rate, seed: planned(name, stage, rate, seed, task),
        finished=lambda key: finished(key, task, progress),
        step_seconds=seconds,
        backbone=BACKBONE,
    )

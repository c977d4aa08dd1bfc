"""The comparison on real text: every method on MiniLM and Rotten Tomatoes, films held out.

    python -m peft compare --task rotten_tomatoes --out notebooks/results

`peft/sweep.py` says how rates are chosen and what is scored when: here by short runs on the validation films. A fresh
classification head is trained beside every method. The sweep takes about two hours on one free thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save as serialize
from torch import Tensor, nn

from minitransformer.generation import evaluation_mode
from minitransformer.heads import SequenceClassifier, mean_pool
from minitransformer.pretrained.minilm import minilm
from minitransformer.tasks.batches import batches_of_like_length
from minitransformer.tasks.dataset import Dataset
from minitransformer.tasks.rotten_tomatoes import TextTask, rotten_tomatoes_splits
from minitransformer.training import History, evaluate, fit, label_loss
from peft import compare
from peft.adapter import BottleneckAdapter
from peft.attach import attach, attached, trainable_parameters
from peft.lora import ALL_LINEARS, LoRA
from peft.method import Method
from peft.prefix import PrefixTuning
from peft.results import Row
from peft.sweep import KEY, MEASURED, Study, identity, measured

BATCH_SIZE = 32
EPOCHS = 3  # of the final runs
CHOICE_EPOCHS = 1  # of the runs that choose the learning rate


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: a method (None: no PEFT method) and the learning rates to choose from."""

    method: Method | None
    learning_rates: tuple[float, ...]
    epochs: int = EPOCHS
    choice_epochs: int = CHOICE_EPOCHS


HEAD, FULL = "head only", "full fine-tuning"
# The sizes are matched: all but "LoRA all" train 74 to 78 thousand numbers, about 0.33% of the model.
ENTRIES = {
    HEAD: Entry(None, (1e-3, 1e-2, 1e-1), epochs=30, choice_epochs=30),  # on stored features: costs next to nothing
    FULL: Entry(None, (5e-5, 1e-4, 2e-4)),
    "LoRA q,v r=8": Entry(LoRA(rank=8, alpha=32.0), (5e-4, 1e-3, 2e-3)),
    "prefix k,v n=16": Entry(PrefixTuning(length=16), (3e-3, 1e-2, 3e-2)),
    "Houlsby adapter m=8": Entry(BottleneckAdapter(bottleneck=8, placement="houlsby"), (1e-3, 3e-3, 1e-2)),
    "Pfeiffer adapter m=16": Entry(BottleneckAdapter(bottleneck=16, placement="pfeiffer"), (1e-3, 3e-3, 1e-2)),
    "parallel adapter m=16": Entry(BottleneckAdapter(bottleneck=16, placement="parallel"), (1e-3, 3e-3, 1e-2)),
    "LoRA all r=8": Entry(LoRA(rank=8, alpha=16.0, targets=ALL_LINEARS), (5e-4, 1e-3)),
}

BACKBONE = "pretrained"
COLUMNS = (*KEY, *MEASURED)


def classifier(name: str, seed: int) -> SequenceClassifier:
    """MiniLM with a fresh head on the mean of its hidden states, and with the method of that name attached.

    Raises:
        ValueError: the comparison has no method of that name.
    """
    if name not in ENTRIES:
        raise ValueError(f"the method {name!r} is unknown; choose one of {', '.join(ENTRIES)}")
    model = SequenceClassifier(minilm(), n_classes=2, pool="mean", seed=seed)
    method = ENTRIES[name].method
    if method is not None:
        return attach(model, method, seed=seed, train_also=("head",))
    if name == HEAD:
        model.transformer.requires_grad_(False)
    return model


def by_length(dataset: Dataset) -> Int[Tensor, "N"]:
    """The numbers of the rows, short ones first: cut into batches in this order, little padding is computed."""
    return dataset.padding_mask.sum(dim=1).argsort(stable=True)


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
                hidden = model.transformer.hidden(part.tokens, part.padding_mask)
                self.features[rows] = mean_pool(hidden, part.padding_mask)
        numbers = torch.arange(len(dataset))[:, None]
        self.rows = Dataset(numbers, torch.ones_like(numbers, dtype=torch.bool), dataset.targets)

    def forward(self, tokens: Int[Tensor, "B 1"], padding_mask: Bool[Tensor, "B 1"]) -> Float[Tensor, "B n_classes"]:
        """The head's scores of the rows with these numbers."""
        return self.head(self.features[tokens[:, 0]])


def train(
    name: str,
    learning_rate: float,
    task: TextTask,
    epochs: int = EPOCHS,
    seed: int = 1,
    progress: bool = True,
    model: SequenceClassifier | None = None,
) -> tuple[SequenceClassifier, History]:
    """Train one method of the comparison; the last weights are kept.

    Args:
        name: a key of `ENTRIES`.
        learning_rate: peak of the schedule.
        task: of `rotten_tomatoes_splits`.
        epochs: walks over the training films.
        seed: of the head, the method's tensors, the order of the data and dropout.
        progress: show a bar.
        model: of `classifier(name, seed)`; made here if left out.

    Returns:
        The classifier, trained, and the history of the run.
    """
    model = classifier(name, seed) if model is None else model
    learner, batches = model, batches_of_like_length(task.train, BATCH_SIZE, seed)
    if name == HEAD:
        learner = StoredFeatures(model, task.train)
        batches = learner.rows
    history = fit(
        learner,
        batches,
        steps=epochs * (len(task.train) // BATCH_SIZE),
        learning_rate=learning_rate,
        batch_size=BATCH_SIZE,
        objective=label_loss,
        seed=seed,
        progress=progress,
        description=name,
    )
    return model, history


def score(model: SequenceClassifier, dataset: Dataset) -> dict[str, float]:
    """Loss and accuracy on a split."""
    return evaluate(model, dataset.rows(by_length(dataset)), objective=label_loss, batch_size=64)


def file_bytes(model: nn.Module) -> int:
    """Size of the file that keeps what was trained: the method's, or all trained weights where there is none."""
    if attached(model):
        return compare.file_bytes(model)
    return len(serialize({name: p.detach() for name, p in trainable_parameters(model).items()}))


def planned(name: str, stage: str, learning_rate: float, seed: int, task: TextTask) -> Row:
    """What identifies a run: the columns of `KEY`, as they stand in the file."""
    entry = ENTRIES[name]
    epochs = entry.epochs if stage == "final" else entry.choice_epochs
    steps = epochs * (len(task.train) // BATCH_SIZE)
    return identity(task.name, BACKBONE, name, entry.method, stage, learning_rate, steps, seed)


def finished(key: Row, task: TextTask, progress: bool = True) -> Row:
    """Do a planned run: the whole row, as it stands in the file. Only a final run reads the test films."""
    epochs = int(key["steps"]) // (len(task.train) // BATCH_SIZE)
    rate, seed = float(key["learning_rate"]), int(key["seed"])
    model, history = train(key["method"], rate, task, epochs, seed, progress)
    test = score(model, task.test) if key["stage"] == "final" else None
    return key | measured(model, history, score(model, task.validation), test, file_bytes(model))


def study(names: Sequence[str] = tuple(ENTRIES), progress: bool = True) -> Study:
    """The sweep over these methods on Rotten Tomatoes."""
    task = rotten_tomatoes_splits()

    def seconds(methods: Sequence[str]) -> dict[str, float]:
        typical = task.train.rows(by_length(task.train)[len(task.train) // 2 :][:BATCH_SIZE]).trimmed()
        models = {name: classifier(name, seed=0) for name in methods if name != HEAD}
        return {HEAD: 0.0} | compare.step_seconds(models, typical, label_loss, rounds=1)  # on stored features: nothing

    return Study(
        columns=COLUMNS,
        rates={name: ENTRIES[name].learning_rates for name in names},
        planned=lambda name, stage, rate, seed: planned(name, stage, rate, seed, task),
        finished=lambda key: finished(key, task, progress),
        step_seconds=seconds,
        backbone=BACKBONE,
    )

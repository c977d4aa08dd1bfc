"""The comparison on real text: every method on MiniLM and Rotten Tomatoes, films held out.

    python -m peft.compare_real_text --out notebooks/results/rotten_tomatoes.csv

Each method gets the learning rate that suits it, chosen on the validation films by short runs with one seed (rows of
stage "choice", which never see the test films). Then it is trained in full with that rate, once per seed, and scored
once on the test films (stage "final"). A fresh classification head is trained beside every method.

The sweep takes about two hours on one free thread. Each finished run is one row of the file, and rows that are there
are not run again: a sweep that was stopped goes on where it stopped.
"""

import argparse
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
from peft.compare import chosen_learning_rate, summaries, table
from peft.counting import parameter_table
from peft.lora import ALL_LINEARS, LoRA
from peft.method import Method
from peft.prefix import PrefixTuning
from peft.results import Row, read_rows, write_rows

BATCH_SIZE = 32
EPOCHS = 3  # of the final runs
CHOICE_EPOCHS = 1  # of the runs that choose the learning rate
CHOICE_SEED = 0
SEEDS = (1, 2, 3)  # of the final runs


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
# What a run is, then what it gave: the columns of `peft.compare`, without its kinds of rows.
KEY = compare.KEY
COLUMNS = tuple(column for column in compare.COLUMNS if column != "test_by_kind")


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
    values = {
        "task": task.name,
        "backbone": BACKBONE,
        "method": name,
        "recipe": "" if entry.method is None else str(entry.method),
        "stage": stage,
        "learning_rate": learning_rate,
        "steps": epochs * (len(task.train) // BATCH_SIZE),
        "seed": seed,
    }
    return {key: str(value) for key, value in values.items()}


def finished(key: Row, task: TextTask, progress: bool = True) -> Row:
    """Do a planned run: the whole row, as it stands in the file. Only a final run reads the test films."""
    epochs = int(key["steps"]) // (len(task.train) // BATCH_SIZE)
    rate, seed = float(key["learning_rate"]), int(key["seed"])
    model, history = train(key["method"], rate, task, epochs, seed, progress)
    validation, counted = score(model, task.validation), parameter_table(model)
    test = f"{score(model, task.test)['accuracy']:.4f}" if key["stage"] == "final" else ""
    return key | {
        "trained_parameters": str(counted.trained),
        "share": f"{counted.share:.6f}",
        "validation_loss": f"{validation['loss']:.4f}",
        "validation_accuracy": f"{validation['accuracy']:.4f}",
        "test_accuracy": test,
        "seconds_per_step": f"{history.seconds_per_step:.4f}",
        "file_bytes": str(file_bytes(model)),
        "threads": str(torch.get_num_threads()),
        "torch_version": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def run(
    out: str | Path,
    names: tuple[str, ...] = tuple(ENTRIES),
    seeds: tuple[int, ...] = SEEDS,
    progress: bool = True,
) -> list[Row]:
    """The whole sweep, or what is missing of it in the file `out`.

    Args:
        out: the CSV file, read first and then extended row by row.
        names: keys of `ENTRIES`.
        seeds: of the final runs.
        progress: show bars.

    Returns:
        All rows of the file.
    """
    task = rotten_tomatoes_splits()
    rows = read_rows(out, COLUMNS)
    for stage in ("choice", "final"):
        for key in _plan(stage, names, seeds, task, rows):
            if not any(all(row[column] == key[column] for column in KEY) for row in rows):
                rows.append(finished(key, task, progress))
                write_rows(out, rows, COLUMNS)
    return rows


def _plan(stage: str, names, seeds, task: TextTask, rows) -> Iterator[Row]:
    """Seeds outside, methods inside: wherever the sweep stops, every method has had its turn."""
    if stage == "choice":
        for name in names:
            for rate in ENTRIES[name].learning_rates:
                yield planned(name, stage, rate, CHOICE_SEED, task)
    else:
        for seed in seeds:
            for name in names:
                yield planned(name, stage, chosen_learning_rate(rows, name, BACKBONE), seed, task)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Every PEFT method on MiniLM and Rotten Tomatoes, films held out.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file; a sweep that was stopped goes on")
    parser.add_argument("--methods", nargs="+", default=list(ENTRIES), choices=list(ENTRIES), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the final runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(table(summaries(run(options.out, tuple(options.methods), tuple(options.seeds)))))


if __name__ == "__main__":
    main()

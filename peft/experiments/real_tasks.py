"""The tasks on real text: for each its splits, its model round MiniLM, and the methods with the rates to choose from.

    rotten_tomatoes   is this sentence for or against the film?         a classification head on the mean hidden state
    reuters_r8        which of eight subjects is this story about?      the same
    quiz              which of four answers belongs to this clue?       likeness of clue and answer, no head

Every model is a fresh MiniLM; a head starts at random and is trained beside every method.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from minitransformer.dual_encoder import DualEncoder
from minitransformer.heads import SequenceClassifier
from minitransformer.pretrained.minilm import minilm
from minitransformer.tasks.real.quiz import quiz_splits
from minitransformer.tasks.real.reuters import reuters_splits
from minitransformer.tasks.real.rotten_tomatoes import rotten_tomatoes_splits
from minitransformer.tasks.real.text import TextTask
from peft.attach import attach
from peft.method import Method
from peft.methods.adapter import BottleneckAdapter
from peft.methods.lora import ALL_LINEARS, LoRA
from peft.methods.prefix import PrefixTuning


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: a method (None: no PEFT method), the rates to choose from, and walks over the data."""

    method: Method | None
    learning_rates: tuple[float, ...]
    epochs: int = 3  # of the final runs; 0 trains nothing
    choice_epochs: int = 1  # of the runs that choose the learning rate
    members: int = 1  # above 1: each final run is a soup of so many runs with seeds of their own

    def seeds(self, seed: int) -> list[int]:
        """The seeds of the members of a final run: 1, 2, 3 for run 1 of three members, 4, 5, 6 for run 2."""
        return list(range((seed - 1) * self.members + 1, seed * self.members + 1))


@dataclass(frozen=True)
class RealTask:
    """What a comparison has to know about one task."""

    title: str
    splits: Callable[[], TextTask]
    model: Callable[[int], nn.Module]  # from a seed: a fresh MiniLM with what the task needs on top
    entries: Mapping[str, Entry]
    train_also: tuple[str, ...] = ()
    batch_size: int = 32


def sequence_classifier(seed: int, n_classes: int) -> SequenceClassifier:
    """MiniLM with a fresh head on the mean of its hidden states."""
    return SequenceClassifier(minilm(), n_classes=n_classes, pool="mean", seed=seed)


def dual_encoder(seed: int) -> DualEncoder:
    """MiniLM as it is: nothing in it is drawn at random."""
    return DualEncoder(minilm())


UNTRAINED, HEAD, FULL = "no training", "head only", "full fine-tuning"
LORA, LORA_ALL, PREFIX = "LoRA q,v r=8", "LoRA all r=8", "prefix k,v n=16"
SOUP = "LoRA all r=8, soup of 3"
PFEIFFER, HOULSBY, PARALLEL = "Pfeiffer adapter m=16", "Houlsby adapter m=8", "parallel adapter m=16"
# The sizes are matched: all but "LoRA all" bring 74 to 78 thousand numbers, about 0.33% of the model.
METHODS = {
    HEAD: None,
    FULL: None,
    LORA: LoRA(rank=8, alpha=32.0),
    PREFIX: PrefixTuning(length=16),
    HOULSBY: BottleneckAdapter(bottleneck=8, placement="houlsby"),
    PFEIFFER: BottleneckAdapter(bottleneck=16, placement="pfeiffer"),
    PARALLEL: BottleneckAdapter(bottleneck=16, placement="parallel"),
    LORA_ALL: LoRA(rank=8, alpha=16.0, targets=ALL_LINEARS),
    SOUP: LoRA(rank=8, alpha=16.0, targets=ALL_LINEARS),
}


def entries(rates: Mapping[str, tuple[float, ...]], **options) -> dict[str, Entry]:
    """Entries of these methods with these rates; the head alone walks further, since on stored features it is quick."""
    further = {"epochs": 30, "choice_epochs": 30}
    return {name: Entry(METHODS[name], grid, **(further if name == HEAD else options)) for name, grid in rates.items()}


TASKS = {
    "rotten_tomatoes": RealTask(
        "Rotten Tomatoes, held-out films",
        rotten_tomatoes_splits,
        partial(sequence_classifier, n_classes=2),
        entries(
            {
                HEAD: (1e-3, 1e-2, 1e-1),
                FULL: (5e-5, 1e-4, 2e-4),
                LORA: (5e-4, 1e-3, 2e-3),
                PREFIX: (3e-3, 1e-2, 3e-2),
                HOULSBY: (1e-3, 3e-3, 1e-2),
                PFEIFFER: (1e-3, 3e-3, 1e-2),
                PARALLEL: (1e-3, 3e-3, 1e-2),
                LORA_ALL: (5e-4, 1e-3),
            }
        )
        | entries({SOUP: (5e-4, 1e-3)}, members=3),
        train_also=("head",),
    ),
    "reuters_r8": RealTask(
        "Reuters R8, standard split",
        reuters_splits,
        partial(sequence_classifier, n_classes=8),
        entries(
            {
                HEAD: (1e-2, 1e-1),
                FULL: (1e-4, 2e-4),
                LORA: (1e-3, 2e-3),
                PREFIX: (1e-2, 3e-2),
                PFEIFFER: (3e-3, 1e-2),
                LORA_ALL: (5e-4, 1e-3),
            }
        ),
        train_also=("head",),
    ),
    "quiz": RealTask(
        "Quiz clues with four answers, held-out shows",
        quiz_splits,
        dual_encoder,
        {UNTRAINED: Entry(None, (0.0,), epochs=0, choice_epochs=0)}
        | entries(
            {
                FULL: (2e-5, 5e-5),
                LORA: (3e-4, 1e-3),
                PREFIX: (3e-3, 1e-2),
                PFEIFFER: (1e-3, 3e-3),
                LORA_ALL: (3e-4, 1e-3),
            }
        ),
    ),
}


def model_for(task: str, name: str, seed: int) -> nn.Module:
    """The model of a task with the method of that name attached.

    Raises:
        ValueError: the comparison of that task has no method of that name.
    """
    setting = TASKS[task]
    if name not in setting.entries:
        raise ValueError(f"the method {name!r} is unknown; choose one of {', '.join(setting.entries)}")
    model, method = setting.model(seed), setting.entries[name].method
    if method is not None:
        return attach(model, method, seed=seed, train_also=setting.train_also)
    if name == HEAD:
        model.transformer.requires_grad_(False)
    return model.requires_grad_(False) if name == UNTRAINED else model

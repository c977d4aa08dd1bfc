"""What is compared: the tasks, the methods on each of them, the learning rates to choose from, and how long a run is.

    sentiment         is this review good or bad?                       text to text: the answer is the next word
    qa                where is the apple?                               the same
    rotten_tomatoes   is this sentence for or against the film?         a classification head on the mean hidden state
    reuters_r8        which of eight subjects is this story about?      the same
    quiz              which of four answers belongs to this clue?       likeness of clue and answer, no head

The toy tasks start from the shipped backbone, the others from MiniLM; a head starts at random and is trained beside
every method. A method joins a comparison by a line in `TOY` or `REAL_TEXT`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from minitransformer import Transformer
from minitransformer.heads import SequenceClassifier
from minitransformer.pretrained import toy_backbone
from minitransformer.pretrained.minilm import minilm
from minitransformer.tasks import Task, qa_splits, sentiment_splits
from minitransformer.tasks.real.dual_encoder import DualEncoder
from minitransformer.tasks.real.quiz import quiz_splits
from minitransformer.tasks.real.reuters import reuters_splits
from minitransformer.tasks.real.rotten_tomatoes import rotten_tomatoes_splits
from minitransformer.tasks.real.text import TextTask
from minitransformer.training import Objective, answer_loss, label_loss
from peft.method import Method
from peft.methods.adapter import BottleneckAdapter
from peft.methods.bitfit import BitFit
from peft.methods.dora import DoRA
from peft.methods.ia3 import IA3
from peft.methods.lora import ALL_LINEARS, LoRA
from peft.methods.prefix import PrefixTuning
from peft.methods.prompt import PromptTuning
from peft.methods.vera import VeRA


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: a method on one task."""

    method: Method | None  # None attaches nothing
    learning_rates: tuple[float, ...]  # to choose from
    steps: int  # of a final run; 0 trains nothing
    choice_steps: int | None = None  # of a run that chooses the learning rate; None means as many
    frozen: bool = False  # without a method: the Transformer stays frozen, and only a head, if there is one, is trained
    ratio: float | None = None  # LoRA+: every B learns that many times as fast as A
    members: int = 1  # above 1: a final run is a soup of so many runs with seeds of their own

    def seeds(self, seed: int) -> list[int]:
        """The seeds of the members of a final run: 1, 2, 3 for run 1 of three members, 4, 5, 6 for run 2."""
        return list(range((seed - 1) * self.members + 1, seed * self.members + 1))


@dataclass(frozen=True)
class Comparison:
    """One task and all that is compared on it."""

    title: str
    splits: Callable[[], Task | TextTask]
    models: Mapping[str, Callable[[int], nn.Module]]  # by backbone: a fresh one, and what the task needs on top
    entries: Mapping[str, Entry]  # by the name of the method
    objective: Objective  # of training and scoring
    train_also: tuple[str, ...] = ()  # modules that are trained whole, beside every method
    like_length: bool = False  # whether a batch holds rows of like length, or rows in random order
    batch_size: int = 32


def toy(method: Method | None, rates: tuple[float, ...], sentiment: int, qa: int, ratio: float | None = None) -> dict:
    """The entries of a method on the toy tasks: the same rates on both, so many steps on each, for every run.

    Runs that choose a rate are as long as final ones: shorter ones would favour the higher rate.
    """
    return {name: Entry(method, rates, n, ratio=ratio) for name, n in (("sentiment", sentiment), ("qa", qa))}


# What learns slowly gets more steps: above all prefixes, on questions whose answer takes two look-ups.
TOY = {
    "full fine-tuning": toy(None, (3e-4, 1e-3), 300, 1200),
    "LoRA q,v r=4": toy(LoRA(rank=4, alpha=8), (2e-3, 5e-3), 300, 600),
    "LoRA all r=4": toy(LoRA(rank=4, alpha=8, targets=ALL_LINEARS), (2e-3, 5e-3), 300, 600),
    "LoRA q,v r=4, B only": toy(LoRA(rank=4, alpha=8, train=("B",)), (5e-3, 2e-2), 300, 600),
    "LoRA q,v r=4, A only": toy(LoRA(rank=4, alpha=8, train=("A",)), (5e-3, 2e-2), 300, 600),
    "LoRA+ q,v r=4": toy(LoRA(rank=4, alpha=8), (1e-3, 2e-3), 300, 600, ratio=4.0),
    "rsLoRA q,v r=16": toy(LoRA(rank=16, alpha=8, rank_stabilized=True), (2e-3, 5e-3), 300, 600),
    "DoRA q,v r=4": toy(DoRA(rank=4, alpha=8), (2e-3, 5e-3), 300, 600),
    "VeRA q,v r=128": toy(VeRA(rank=128), (5e-2, 1e-1), 300, 1200),
    "Houlsby adapter m=8": toy(BottleneckAdapter(bottleneck=8, placement="houlsby"), (5e-3, 1e-2), 300, 2400),
    "Pfeiffer adapter m=8": toy(BottleneckAdapter(bottleneck=8, placement="pfeiffer"), (5e-3, 1e-2), 300, 1200),
    "parallel adapter m=8": toy(BottleneckAdapter(bottleneck=8, placement="parallel"), (5e-3, 1e-2), 300, 1200),
    "adapter inside FFN m=4": toy(BottleneckAdapter(bottleneck=4, placement="inside_ffn"), (5e-3, 1e-2), 300, 1200),
    "prefix k,v n=16": toy(PrefixTuning(length=16), (3e-2, 5e-2), 1200, 2400),
    "gated prefix k,v n=32": toy(PrefixTuning(length=32, gated=True), (5e-2, 1e-1), 600, 4800),
    "prefix k,v n=16 by MLP": toy(PrefixTuning(length=16, reparameterize=64), (1e-3, 3e-3), 1200, 1200),
    "prefix hidden n=16": toy(PrefixTuning(length=16, at="hidden"), (1e-2, 3e-2), 1200, 2400),
    "soft prompt n=16": toy(PromptTuning(length=16), (3e-2, 1e-1), 1200, 2400),
    "BitFit": toy(BitFit(), (5e-3, 2e-2), 300, 1200),
    "IA3": toy(IA3(), (1e-2, 5e-2), 300, 1200),
}
RANDOM_BACKBONE = ("LoRA q,v r=4", "LoRA all r=4", "Pfeiffer adapter m=8", "prefix hidden n=16")

EPOCH = {"rotten_tomatoes": 106, "reuters_r8": 152, "quiz": 93}  # steps: the whole batches of the training split


def real(method: Method | None, *rates: tuple[float, ...], epochs: int = 3, choice_epochs: int = 1, **options) -> dict:
    """The entries of a method on the tasks of `EPOCH`, in that order: rates of its own on each, () leaves it out."""
    return {
        name: Entry(method, grid, epochs * epoch, choice_epochs * epoch, **options)
        for (name, epoch), grid in zip(EPOCH.items(), rates, strict=True)
        if grid
    }


UNTRAINED, HEAD, FULL = "no training", "head only", "full fine-tuning"
LORA, LORA_ALL, SOUP = "LoRA q,v r=8", "LoRA all r=8", "LoRA all r=8, soup of 3"
PREFIX, HOULSBY, PFEIFFER = "prefix k,v n=16", "Houlsby adapter m=8", "Pfeiffer adapter m=16"
PARALLEL = "parallel adapter m=16"
ADAPTER_RATES, ALL_MAPS = (1e-3, 3e-3, 1e-2), LoRA(rank=8, alpha=16.0, targets=ALL_LINEARS)
# The sizes are matched: all but LoRA on all linear layers bring 74 to 78 thousand parameters, about 0.33% of the model.
# The head alone trains for more epochs, since on stored features that is quick.
REAL_TEXT = {
    UNTRAINED: real(None, (), (), (0.0,), epochs=0, choice_epochs=0, frozen=True),
    HEAD: real(None, (1e-3, 1e-2, 1e-1), (1e-2, 1e-1), (), epochs=30, choice_epochs=30, frozen=True),
    FULL: real(None, (5e-5, 1e-4, 2e-4), (1e-4, 2e-4), (2e-5, 5e-5)),
    LORA: real(LoRA(rank=8, alpha=32.0), (5e-4, 1e-3, 2e-3), (1e-3, 2e-3), (3e-4, 1e-3)),
    PREFIX: real(PrefixTuning(length=16), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2), (3e-3, 1e-2)),
    HOULSBY: real(BottleneckAdapter(bottleneck=8, placement="houlsby"), ADAPTER_RATES, (), ()),
    PFEIFFER: real(BottleneckAdapter(bottleneck=16, placement="pfeiffer"), ADAPTER_RATES, (3e-3, 1e-2), (1e-3, 3e-3)),
    PARALLEL: real(BottleneckAdapter(bottleneck=16, placement="parallel"), ADAPTER_RATES, (), ()),
    LORA_ALL: real(ALL_MAPS, (5e-4, 1e-3), (5e-4, 1e-3), (3e-4, 1e-3)),
    SOUP: real(ALL_MAPS, (5e-4, 1e-3), (), (), members=3),
}


def entries(table: Mapping[str, Mapping[str, Entry]], task: str) -> dict[str, Entry]:
    """The column of one task, out of a table by method and task."""
    return {name: by_task[task] for name, by_task in table.items() if task in by_task}


def classifier(n_classes: int) -> dict[str, Callable[[int], nn.Module]]:
    """MiniLM with a fresh head on the mean of its hidden states."""
    return {"pretrained": lambda seed: SequenceClassifier(minilm(), n_classes=n_classes, pool="mean", seed=seed)}


# The random backbone has the shape of the shipped one: what a method then reaches, it owes to the task alone.
TOY_MODELS = {
    "pretrained": lambda seed: toy_backbone(),
    "random": lambda seed: Transformer(toy_backbone().config, seed=12345),
}
DUAL_ENCODER = {"pretrained": lambda seed: DualEncoder(minilm())}
HEADED = {"objective": label_loss, "train_also": ("head",), "like_length": True}
TASKS = {
    "sentiment": Comparison("Sentiment", sentiment_splits, TOY_MODELS, entries(TOY, "sentiment"), answer_loss),
    "qa": Comparison("Question answering", qa_splits, TOY_MODELS, entries(TOY, "qa"), answer_loss),
    "rotten_tomatoes": Comparison(
        "Rotten Tomatoes, held-out films",
        rotten_tomatoes_splits, classifier(2), entries(REAL_TEXT, "rotten_tomatoes"), **HEADED,
    ),
    "reuters_r8": Comparison(
        "Reuters R8, standard split", reuters_splits, classifier(8), entries(REAL_TEXT, "reuters_r8"), **HEADED
    ),
    "quiz": Comparison(
        "Quiz clues with four answers, held-out shows",
        quiz_splits, DUAL_ENCODER, entries(REAL_TEXT, "quiz"), label_loss, like_length=True,
    ),
}  # fmt: skip

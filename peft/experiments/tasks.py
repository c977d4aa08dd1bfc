"""What is compared: the tasks, the methods on each of them, the learning rates to choose from, and how long a run is.

    sentiment         is this review good or bad?                       text to text: the answer is the next word
    qa                where is the apple?                               the same
    rotten_tomatoes   is this sentence for or against the film?         a classification head on the mean hidden state
    reuters_r8        which of eight subjects is this story about?      the same
    quiz              which of four answers belongs to this clue?       likeness of clue and answer, no head
    movers            where is who?                                     a language model says it, in words of its own
    records           this sentence as JSON, with these keys            the same
    rotten_tomatoes_words    positive or negative?                      the same, on the split of `rotten_tomatoes`

The toy tasks start from the shipped backbone, the next three from MiniLM, whose head starts at random and is trained
beside every method, the last three from SmolLM2. A method joins a comparison by a line in `TOY`, `REAL_TEXT` or
`LANGUAGE`.

What a language model says is right if it is the answer, all of it and nothing else, in greedy generation. A rate is
chosen by such answers to a part of the validation split (64 rows, of the reviews 200), and among equals by the loss per
word there: 64 answers to movers take as long as two training steps, and the loss alone may fall where the answers get
worse. A run that chooses has half the steps of a final one.
The test is the whole test split: 200 rows, of the reviews all 1,000 of the unseen films.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from minitransformer import Transformer
from minitransformer.heads import SequenceClassifier
from minitransformer.pretrained import toy_backbone
from minitransformer.pretrained.minilm import minilm
from minitransformer.pretrained.smollm2 import SHA256, smollm2, smollm2_tokenizer
from minitransformer.quantized import quantize
from minitransformer.tasks import Task, qa_splits, sentiment_splits
from minitransformer.tasks.language.movers import movers_splits
from minitransformer.tasks.language.records import records_splits
from minitransformer.tasks.language.rotten_tomatoes import rotten_tomatoes_pairs
from minitransformer.tasks.language.splits import PairTask, pair_task
from minitransformer.tasks.real.dual_encoder import DualEncoder
from minitransformer.tasks.real.quiz import quiz_splits
from minitransformer.tasks.real.reuters import reuters_splits
from minitransformer.tasks.real.rotten_tomatoes import rotten_tomatoes_splits
from minitransformer.tasks.real.text import TextTask
from minitransformer.training import Objective, answer_loss, answer_only, label_loss
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
    splits: Callable[[], Task | TextTask | PairTask]
    models: Mapping[str, Callable[[int], nn.Module]]  # by backbone: a fresh one, and what the task needs on top
    entries: Mapping[str, Entry]  # by the name of the method
    objective: Objective  # of training and scoring
    train_also: tuple[str, ...] = ()  # modules that are trained whole, beside every method
    like_length: bool = False  # whether a batch holds rows of like length, or rows in random order
    batch_size: int = 32
    schedule: str = "cosine"  # of the learning rate, and its steps of warm-up, as `fit` has them
    warmup: int | None = None
    seeds: int = 5  # final runs of each method, unless it is said how many
    base: str | None = None  # a digest of the file that the base comes from; None: one of the weights is taken
    note_every: int | None = None  # of a `PairTask`: so many steps of a final run lie between two looks at its answers


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


STEPS = {"movers": 100, "records": 100, "rotten_tomatoes_words": 300}  # of 16 rows; a run that chooses has half as many


def language(
    method: Method | Mapping[str, Method] | None, rates: tuple[float, ...], frozen: bool = False
) -> dict[str, Entry]:
    """The entries of a method on these tasks: the same rates on each; a mapping has a recipe for each task."""
    recipes = method if isinstance(method, Mapping) else dict.fromkeys(STEPS, method)
    steps = {name: 0 if frozen else own for name, own in STEPS.items()}
    return {name: Entry(recipes[name], rates, own, own // 2, frozen=frozen) for name, own in steps.items()}


# The real words that a prefix and a soft prompt start from, in SmolLM2's numbers; `INIT_WORDS` spells them.
INIT_WORDS = {
    "movers": "Here is a short story about people who move from one city to another city.",
    "records": "Here is a sentence, and here is what it says as JSON with the keys",
    "rotten_tomatoes_words": "Here is what a film critic wrote, and whether the review is positive or negative",
}
INIT_TOKENS = {
    "movers": (4590, 314, 253, 1890, 1977, 563, 701, 617, 1485, 429, 582, 2240, 288, 1372, 2240, 30),
    "records": (4590, 314, 253, 6330, 28, 284, 1535, 314, 732, 357, 1921, 347, 20110, 351, 260, 8889),
    "rotten_tomatoes_words": (4590, 314, 732, 253, 4771, 6112, 4150, 28, 284, 1991, 260, 2523, 314, 2731, 355, 3524),
}
PROMPT = "soft prompt n=16"
LANGUAGE = {
    UNTRAINED: language(None, (0.0,), frozen=True),
    FULL: language(None, (3e-5, 1e-4)),
    LORA: language(LoRA(rank=8, alpha=16.0), (1e-3, 3e-3)),
    LORA_ALL: language(LoRA(rank=8, alpha=16.0, targets=(*ALL_LINEARS, "gate")), (5e-4, 1e-3)),
    PREFIX: language({t: PrefixTuning(length=16, init_tokens=own) for t, own in INIT_TOKENS.items()}, (1e-2, 5e-2)),
    PROMPT: language({t: PromptTuning(length=16, init_tokens=own) for t, own in INIT_TOKENS.items()}, (5e-3, 2e-2)),
    PFEIFFER: language(BottleneckAdapter(bottleneck=16, placement="pfeiffer"), (1e-3, 3e-3)),
    "IA3": language(IA3(), (1e-2, 5e-2)),
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
# With products in bfloat16 the frozen weights have 16 bits too; what is trained keeps 32.
BFLOAT16 = " bfloat16"  # at the end of the name of such a backbone
NF4, Q4_1 = " nf4", " q4_1"  # the same for 4 bits: frozen linear layers only, products in float32
SMOLLM2 = {
    "pretrained": lambda seed: smollm2(),
    "pretrained" + BFLOAT16: lambda seed: smollm2(torch.bfloat16),
    "pretrained" + NF4: lambda seed: quantize(smollm2().requires_grad_(False), "nf4"),
    "pretrained" + Q4_1: lambda seed: smollm2(quantized=True),  # as in the file
}
SPOKEN = {
    "objective": answer_only, "like_length": True, "batch_size": 16, "schedule": "linear", "warmup": 10, "seeds": 3,
    "base": SHA256[:12], "note_every": 10,
}  # fmt: skip
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
    "movers": Comparison(
        "Where is who, said by a language model",
        lambda: pair_task(movers_splits(), smollm2_tokenizer(), validation=64), SMOLLM2, entries(LANGUAGE, "movers"),
        **SPOKEN,
    ),
    "records": Comparison(
        "From a sentence to JSON",
        lambda: pair_task(records_splits(), smollm2_tokenizer(), validation=64), SMOLLM2, entries(LANGUAGE, "records"),
        **SPOKEN,
    ),
    "rotten_tomatoes_words": Comparison(
        "Rotten Tomatoes in words, held-out films",
        lambda: pair_task(rotten_tomatoes_pairs(), smollm2_tokenizer(), validation=200), SMOLLM2,
        entries(LANGUAGE, "rotten_tomatoes_words"), **SPOKEN,
    ),
}  # fmt: skip


def methods_on(task: str, backbone: str) -> list[str]:
    """The methods of a task that are run on that backbone: what has 4 bits is not tuned fully."""
    entries = TASKS[task].entries
    if backbone == "random":
        return [name for name in RANDOM_BACKBONE if name in entries] or list(entries)
    is_rounded = backbone.endswith((NF4, Q4_1))
    return [name for name, entry in entries.items() if not is_rounded or entry.method is not None or entry.frozen]


def precision_of(backbone: str) -> torch.dtype:
    """The type of the matrix products on a backbone of that name, in training."""
    return torch.bfloat16 if backbone.endswith(BFLOAT16) else torch.float32

"""A task of pairs in the tokens of one tokenizer: splits to train on that know their texts and can be asked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from torch import nn

from minitransformer.tasks.dataset import Dataset
from minitransformer.tasks.language.pairs import LanguageTask, Pair
from minitransformer.tasks.language.rows import answer_rows, generated_answers


@dataclass(frozen=True)
class PairSplit(Dataset):
    """One split: the rows of `answer_rows`, and the pairs that they were."""

    pairs: tuple[Pair, ...]

    def first(self, n: int) -> "PairSplit":
        """The first n rows, or all where there are fewer."""
        return PairSplit(self.tokens[:n], self.padding_mask[:n], self.targets[:n], self.pairs[:n])


@dataclass(frozen=True)
class PairTask:
    """A `LanguageTask` in the tokens of one tokenizer.

    `max_new_tokens` has room for the longest answer of any split and for the end of its turn: whoever says more than
    that is cut off, and is wrong anyway.
    """

    name: str
    texts: LanguageTask
    tokenizer: object
    max_new_tokens: int
    train: PairSplit
    validation: PairSplit
    test: PairSplit

    def said(self, model: nn.Module, split: PairSplit) -> list[str]:
        """What the model says to each prompt of a split, greedily."""
        return generated_answers(model, self.tokenizer, split.pairs, self.max_new_tokens)

    def accuracy(self, model: nn.Module, split: PairSplit) -> float:
        """The share of prompts to which the model says the answer, all of it and nothing else."""
        return self.texts.accuracy(self.said(model, split), split.pairs)

    def accuracy_by_kind(self, said: Sequence[str], split: PairSplit) -> dict[str, float]:
        """The same of what was said, on each kind of pair."""
        shares = {}
        for kind in sorted({pair.kind for pair in split.pairs}):
            own = [(text, pair) for text, pair in zip(said, split.pairs, strict=True) if pair.kind == kind]
            shares[kind] = self.texts.accuracy(*zip(*own, strict=True))
        return shares


def pair_task(texts: LanguageTask, tokenizer, validation: int | None = None, test: int | None = None) -> PairTask:
    """A task of texts -> rows of tokens.

    Args:
        texts: such as `movers_splits()`.
        tokenizer: as `answer_rows` takes it, with `decode`.
        validation, test: so many of the rows of these splits, always the same ones, drawn at random; None takes all.

    Raises:
        ValueError: a prompt without a token, or more rows than there are, or less than one.
    """
    drawn = {"train": None, "validation": validation, "test": test}
    texts = replace(texts, **{name: _drawn(getattr(texts, name), n, name) for name, n in drawn.items()})
    splits = {name: _split(getattr(texts, name), tokenizer) for name in drawn}
    longest = max(int((split.targets != -100).sum(dim=1).max()) for split in splits.values())
    return PairTask(texts.name, texts, tokenizer, longest, **splits)


def _drawn(pairs: tuple[Pair, ...], n: int | None, name: str) -> tuple[Pair, ...]:
    if n is None:
        return pairs
    if not 1 <= n <= len(pairs):
        raise ValueError(f"{name}={n}: choose between 1 and the {len(pairs)} that there are")
    return tuple(Random(f"pairs/{name}").sample(pairs, n))


def _split(pairs: tuple[Pair, ...], tokenizer) -> PairSplit:
    return PairSplit(**vars(answer_rows(tokenizer, pairs)), pairs=pairs)

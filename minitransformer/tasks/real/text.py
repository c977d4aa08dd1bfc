"""Classification of real texts: a data set that knows its rows as they were written, and a task of three of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import torch

from minitransformer.pretrained.minilm import encode_texts
from minitransformer.tasks.dataset import Dataset

Group = TypeVar("Group")


@dataclass(frozen=True)
class TextSplit(Dataset):
    """One split: targets are class numbers, and each row's text is kept."""

    texts: tuple[str, ...]
    classes: tuple[str, ...]

    def text(self, index: int) -> str:
        """One row as it was written."""
        return self.texts[index]

    def answer(self, index: int) -> str:
        """The class of one row, by name."""
        return self.classes[int(self.targets[index])]


@dataclass(frozen=True)
class TextTask:
    """A classification task on real text: three splits without a text in common."""

    name: str
    classes: tuple[str, ...]
    train: TextSplit
    validation: TextSplit
    test: TextSplit


def encoded(
    rows: Sequence[tuple[str, str]], classes: tuple[str, ...], tokenizer, max_tokens: int | None
) -> dict[str, object]:
    """(text, class) pairs -> the fields of a `TextSplit`.

    Args:
        rows: each text with the name of its class.
        classes: all names; a target is the place of its name in them.
        tokenizer: of `minilm_tokenizer`.
        max_tokens: longer rows are cut, [CLS] and [SEP] counted; None cuts nothing.

    Raises:
        ValueError: no rows, or `max_tokens` below 3.
    """
    texts = tuple(text for text, _ in rows)
    tokens, padding_mask = encode_texts(list(texts), tokenizer, max_tokens)
    targets = torch.tensor([classes.index(label) for _, label in rows])
    return {"tokens": tokens, "padding_mask": padding_mask, "targets": targets, "texts": texts, "classes": classes}


def held_out(
    groups: Sequence[Group], shares: tuple[float, float, float], seed: str
) -> tuple[set[Group], set[Group], set[Group]]:
    """Whole groups (films, shows) for train, validation and test: shuffled by the seed, then cut by their shares."""
    shuffled = list(groups)
    Random(seed).shuffle(shuffled)
    train = round(shares[0] * len(shuffled))
    validation = train + round(shares[1] * len(shuffled))
    return set(shuffled[:train]), set(shuffled[train:validation]), set(shuffled[validation:])

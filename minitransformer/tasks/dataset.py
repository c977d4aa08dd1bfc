"""A data set: three tensors, row by row. What a target is (a word, a class, all words of an answer) is for the task."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minitransformer.vocabulary import Vocabulary


@dataclass(frozen=True)
class Dataset:
    """N rows of tokens, each with a target: in text-to-text tasks the token that should follow the last real one.

    Rows are padded on the right. `padding_mask` is True at real tokens. A row may hold several texts, as multiple
    choice needs: then there is one dimension more. Where answers are of several tokens, targets are [N, T]: the token
    that should follow each position, and -100 where nothing is asked.

    Raises:
        ValueError: the three tensors disagree in shape, or a text holds no real token.
    """

    tokens: Int[Tensor, "N *texts T"]
    padding_mask: Bool[Tensor, "N *texts T"]
    targets: Int[Tensor, "N *asked"]

    def __post_init__(self):
        shapes = (self.tokens.shape, self.tokens.shape[:1])  # a target for every token, or one for every row
        if self.padding_mask.shape != self.tokens.shape or self.targets.shape not in shapes:
            raise ValueError(
                f"tokens {tuple(self.tokens.shape)}, padding_mask {tuple(self.padding_mask.shape)} and "
                f"targets {tuple(self.targets.shape)} do not fit together: make them [N, T], [N, T] and [N] (or [N, T])"
            )
        if not self.padding_mask.any(dim=-1).all():
            raise ValueError("a row holds no real token: drop it, or mark its tokens True in padding_mask")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """How many real tokens each row has, in its longest text."""
        return self.padding_mask.sum(dim=-1)[..., None].flatten(1).amax(dim=1)

    def rows(self, index: Int[Tensor, " n"] | slice) -> "Dataset":
        """The chosen rows as a data set of their own."""
        return Dataset(self.tokens[index], self.padding_mask[index], self.targets[index])

    def trimmed(self) -> "Dataset":
        """The same rows without the columns on the right that are padding in all of them."""
        tokens, padding_mask = without_padding(self.tokens, self.padding_mask)
        targets = self.targets if self.targets.dim() == 1 else self.targets[:, : tokens.shape[1]]
        return Dataset(tokens, padding_mask, targets)

    def parts(self, n: int) -> list["Dataset"]:
        """The rows in n parts of like size, trimmed; fewer where there are fewer rows."""
        return [self.rows(rows).trimmed() for rows in torch.arange(len(self)).chunk(n)]


def without_padding(
    tokens: Int[Tensor, "*rows T"], padding_mask: Bool[Tensor, "*rows T"]
) -> tuple[Int[Tensor, "*rows W"], Bool[Tensor, "*rows W"]]:
    """The same texts without the columns on the right that are padding in all of them."""
    width = int(padding_mask.flatten(0, -2).any(dim=0).nonzero().max()) + 1
    return tokens[..., :width], padding_mask[..., :width]


def by_length(dataset: Dataset) -> Int[Tensor, " N"]:
    """The numbers of the rows, short ones first: cut into batches in this order, little padding is computed."""
    return dataset.lengths.argsort(stable=True)


def pad_rows(rows: list[list[int]], pad_id: int) -> tuple[Int[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """Rows of unequal length -> one tensor padded on the right to the longest, and its padding mask.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to pad: give at least one")
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    padding_mask = torch.arange(tokens.shape[1])[None, :] < lengths[:, None]
    return tokens, padding_mask


@dataclass(frozen=True)
class Split(Dataset):
    """One split of a task: a data set that also knows each row's kind and can show its words."""

    kinds: tuple[str, ...]
    vocabulary: Vocabulary

    def text(self, index: int) -> str:
        """The words of one row, without its answer."""
        return self.vocabulary.decode(self.tokens[index])

    def answer(self, index: int) -> str:
        """The answer word of one row."""
        return self.vocabulary.words[int(self.targets[index])]

    def of_kind(self, kind: str) -> Dataset:
        """The rows of one kind.

        Raises:
            ValueError: no row is of this kind; the message lists the kinds there are.
        """
        chosen = torch.tensor([own == kind for own in self.kinds]).nonzero()[:, 0]
        if len(chosen) == 0:
            kinds = ", ".join(sorted(set(self.kinds)))
            raise ValueError(f"no row is of kind {kind!r}; the kinds are {kinds}")
        return self.rows(chosen)


@dataclass(frozen=True)
class Task:
    """A task: three splits without a text in common, and the words that can be the answer."""

    name: str
    kinds: tuple[str, ...]
    answers: tuple[str, ...]
    vocabulary: Vocabulary
    train: Split
    validation: Split
    test: Split

    @property
    def answer_ids(self) -> Int[Tensor, " n_answers"]:
        """The ids of the answer words, in the order of `answers`."""
        return torch.tensor(self.vocabulary.encode(list(self.answers)))


@dataclass(frozen=True)
class Example:
    """One text with its answer word, as a generator writes it."""

    words: tuple[str, ...]
    answer: str
    kind: str


def split_of(examples: list[Example], vocabulary: Vocabulary) -> Split:
    """Examples -> the tensors of a split; every row starts with `<bos>`."""
    rows = [[vocabulary.bos_id, *vocabulary.encode(example.words)] for example in examples]
    tokens, padding_mask = pad_rows(rows, vocabulary.pad_id)
    targets = torch.tensor([vocabulary.id(example.answer) for example in examples])
    return Split(tokens, padding_mask, targets, tuple(example.kind for example in examples), vocabulary)


def task_of(
    name: str,
    kinds: tuple[str, ...],
    answers: tuple[str, ...],
    examples: list[Example],
    sizes: tuple[int, int, int],
    vocabulary: Vocabulary,
) -> Task:
    """Examples -> a task: the first for training, the next for validation, the last for the test.

    The caller sees to it that their order says nothing about their kind: what comes late would be tested more.
    """
    end = (sizes[0], sizes[0] + sizes[1])
    parts = (examples[: end[0]], examples[end[0] : end[1]], examples[end[1] :])
    return Task(name, kinds, answers, vocabulary, *(split_of(part, vocabulary) for part in parts))

"""A task as text: prompts, each with the answer that should follow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Messages = tuple[dict[str, str], ...]  # a conversation so far: {"role": "user", "content": "Hello!"}, …


@dataclass(frozen=True)
class Pair:
    """A prompt with its answer.

    A prompt that is a text is gone on with as it stands; one that is a conversation is answered in a turn of its own.
    """

    prompt: str | Messages
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class LanguageTask:
    """Three splits without a prompt in common, and what counts as the answer."""

    name: str
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    matches: Callable[[str, str], bool]  # (what was said, the answer)

    def accuracy(self, said: Sequence[str], pairs: Sequence[Pair]) -> float:
        """The share of answers that are right.

        Raises:
            ValueError: nothing is asked, or not one thing was said to each prompt.
        """
        if not pairs or len(said) != len(pairs):
            raise ValueError(f"{len(said)} texts for {len(pairs)} prompts; give one for each, and at least one")
        return sum(self.matches(text, pair.answer) for text, pair in zip(said, pairs, strict=True)) / len(pairs)


def ask(text: str, answer: str, kind: str = "") -> Pair:
    """A conversation that begins with this text of the user's."""
    return Pair(({"role": "user", "content": text},), answer, kind)


def same_text(said: str, answer: str) -> bool:
    """The answer and nothing else; blanks round it do not count, capitals and full stops do."""
    return said.strip() == answer.strip()


def cut(pairs: Sequence[Pair], sizes: tuple[int, int, int]) -> dict[str, tuple[Pair, ...]]:
    """Pairs -> the splits of a task: so many for training, then for validation, then for the test.

    The caller sees to it that their order says nothing about their kind: what comes late would be tested more.
    """
    first, second = sizes[0], sizes[0] + sizes[1]
    pairs = tuple(pairs[: sum(sizes)])
    return {"train": pairs[:first], "validation": pairs[first:second], "test": pairs[second:]}


def check_sizes(sizes: tuple[int, int, int], most: int) -> None:
    """Raise ValueError for a split without rows, or more rows than there can be."""
    if len(sizes) != 3 or {*map(type, sizes)} != {int} or min(sizes) < 1 or sum(sizes) > most:
        raise ValueError(f"sizes={sizes} are rows of train, validation and test: each at least 1, {most} at most")

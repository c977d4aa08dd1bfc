"""Real questions: quiz clues with four answers to choose from, the wrong ones out of the same category.

    Also known as an alligator pear
    croutons / an avocado / hot dog / fish         -> an avocado

Source: 23,917 clues of the television quiz Jeopardy! in 100 categories, in the file that the package `pyquizrd`
carries. Clues that need a picture or a sound (they hold a link) are dropped, and so are those below four words.

Split by show: no show has clues in two splits. Answers may occur in several, as they do in the quiz itself.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import torch

from minitransformer.pretrained.installed import installed_file
from minitransformer.pretrained.minilm import encode_texts, minilm_tokenizer
from minitransformer.tasks.real.text import TextSplit, TextTask, held_out

PACKAGE = "pyquizrd"
FILE = "jeopardy/pruned_jeopardy.json"
SHA256 = "19dbb8ea8b8f602688d9a3b20bfe005830efe3f566097c16fe40e669046e45ac"

PLACES = ("first", "second", "third", "fourth")  # of the right answer: targets 0 to 3
SIZES = (3_000, 500, 1_000)  # questions of train, validation, test
SHARES = (0.65, 0.15, 0.2)  # of the shows
FEWEST_WORDS = 4


@dataclass(frozen=True)
class Clue:
    """One clue with its right answer."""

    text: str
    answer: str
    category: str
    show: int


@dataclass(frozen=True)
class QuizSplit(TextSplit):
    """Rows of five texts: the clue, then the choices; `choices` are those as they were written."""

    choices: tuple[tuple[str, ...], ...]

    def answer(self, index: int) -> str:
        """The right one of the choices."""
        return self.choices[index][int(self.targets[index])]


def clues() -> list[Clue]:
    """All usable clues in the order of the file, each once.

    Raises:
        ModuleNotFoundError: the package with the file is not installed; the message says the command that does it.
        ValueError: the package holds another file.
    """
    columns = json.loads(installed_file(PACKAGE, FILE, SHA256))
    by_text: dict[str, Clue] = {}
    for key, text in columns["question"].items():
        text, answer = (words.replace("\\'", "'").strip() for words in (text, columns["answer"][key]))
        if answer and "<" not in text + answer and len(text.split()) >= FEWEST_WORDS:
            by_text.setdefault(text, Clue(text, answer, columns["category"][key], columns["show_number"][key]))
    return list(by_text.values())


def quiz_splits(seed: int = 0, sizes: tuple[int, int, int] = SIZES) -> TextTask:
    """The task in MiniLM's word pieces: rows of five texts, targets are places among the four choices.

    Args:
        seed: decides which shows go where, which clues are asked and which wrong answers stand beside the right one.
        sizes: how many questions each split has.

    Raises:
        ModuleNotFoundError: a package is not installed; the message says the command that does it.
        ValueError: more questions than there are clues.
    """
    everything, tokenizer = clues(), minilm_tokenizer()
    parts = split_shows({clue.show for clue in everything}, seed)
    splits = []
    for n, shows in zip(sizes, parts, strict=True):
        rows = [clue for clue in everything if clue.show in shows]
        if n > len(rows):
            raise ValueError(f"{n} questions are asked for, but the shows of that split have {len(rows)} clues")
        random = Random(f"quiz/{seed}/{len(splits)}")
        splits.append(_split(random.sample(rows, n), wrong_answers(rows), tokenizer, random))
    return TextTask("quiz", PLACES, *splits)


def split_shows(shows: Iterable[int], seed: int = 0) -> tuple[set[int], set[int], set[int]]:
    """The shows of train, validation and test: shuffled, then cut by `SHARES`."""
    return held_out(sorted(shows), SHARES, f"quiz/{seed}")


def wrong_answers(rows: Iterable[Clue]) -> dict[str, list[str]]:
    """The answers of each category, each once whatever its capitals."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for clue in rows:
        found[clue.category].setdefault(clue.answer.lower(), clue.answer)
    return {category: list(answers.values()) for category, answers in found.items()}


def choices_of(clue: Clue, pool: list[str], random: Random) -> tuple[str, ...]:
    """The right answer and three wrong ones of its category, shuffled."""
    others = [answer for answer in pool if answer.lower() != clue.answer.lower()]
    choices = [clue.answer, *random.sample(others, len(PLACES) - 1)]
    random.shuffle(choices)
    return tuple(choices)


def _split(rows: list[Clue], pools: dict[str, list[str]], tokenizer, random: Random) -> QuizSplit:
    choices = tuple(choices_of(clue, pools[clue.category], random) for clue in rows)
    texts = [text for clue, options in zip(rows, choices, strict=True) for text in (clue.text, *options)]
    tokens, padding_mask = encode_texts(texts, tokenizer)
    shape = (len(rows), 1 + len(PLACES), -1)
    targets = torch.tensor([options.index(clue.answer) for clue, options in zip(rows, choices, strict=True)])
    return QuizSplit(
        tokens.view(shape), padding_mask.view(shape), targets, tuple(clue.text for clue in rows), PLACES, choices
    )

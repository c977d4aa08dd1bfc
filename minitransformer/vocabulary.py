"""Words and their ids: a word-level vocabulary, small enough to print.

Differs from real tokenizers: no sub-words, so a word outside the list is an error (with the nearest known
words) and never an `<unk>` that silently loses what the reader typed.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

from jaxtyping import Int
from torch import Tensor

TOKEN_PATTERN = re.compile(r"<\w+>|\w+|[^\w\s]")


class Vocabulary:
    """A fixed list of words; a word's id is its index in the list.

    `<pad>` has id 0, and `<bos>`, which opens every document, has id 1; they are put in front of the given words.

    Raises:
        ValueError: a word is given twice.
    """

    pad_id, bos_id = 0, 1

    def __init__(self, words: Sequence[str]):
        self.words = ("<pad>", "<bos>", *words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) < len(self.words):
            twice = sorted({word for word in self.words if self.words.count(word) > 1})
            raise ValueError(f"these words are in the list twice: {', '.join(twice)}; give each word once")

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} words: {' '.join(self.words[:6])} ...)"

    def id(self, word: str) -> int:
        """The id of one word; ValueError, with the nearest known words, if it is unknown."""
        if word not in self._ids:
            near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
            cure = f"did you mean {' or '.join(near)}?" if near else "see Vocabulary.words for the whole list"
            raise ValueError(f"the word {word!r} is not in the vocabulary of {len(self)} words; {cure}")
        return self._ids[word]

    def encode(self, text: str | Iterable[str]) -> list[int]:
        """The ids of a list of words, or of a text, lower-cased and punctuation split off. ValueError as in `id`."""
        words = TOKEN_PATTERN.findall(text.lower()) if isinstance(text, str) else text
        return [self.id(word) for word in words]

    def decode(self, ids: Iterable[int] | Int[Tensor, " T"]) -> str:
        """Turn ids (a list or a 1-D tensor) back into words joined by spaces; `<pad>` is left out.

        Raises:
            ValueError: an id is negative or beyond the vocabulary.
        """
        indices = [int(index) for index in ids]
        for index in indices:
            if not 0 <= index < len(self):
                raise ValueError(f"the id {index} is not in the vocabulary: ids run from 0 to {len(self) - 1}")
        return " ".join(self.words[index] for index in indices if index != self.pad_id)

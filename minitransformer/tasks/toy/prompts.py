"""A sentence typed by the reader -> the row of token ids that a model of the task expects."""

import torch
from jaxtyping import Int
from torch import Tensor

from minitransformer.tasks.toy.classification import PROMPT
from minitransformer.tasks.toy.world import world_vocabulary


def encode_question(text: str) -> Int[Tensor, "1 T"]:
    """A story with its question, such as "mary went to paris . where is mary ?".

    Raises:
        ValueError: the text does not end with "?", or holds an unknown word (the message names near ones).
    """
    if not text.rstrip().endswith("?"):
        raise ValueError('a question ends with "?": add one, such as "where is mary ?", after the story')
    vocabulary = world_vocabulary()
    return torch.tensor([[vocabulary.bos_id, *vocabulary.encode(text)]])


def encode_review(text: str) -> Int[Tensor, "1 T"]:
    """A review, such as "the plot was not dull but charming ."; the prompt "so the sentiment is" is added.

    Raises:
        ValueError: the text is empty, or holds an unknown word (the message names the nearest known ones).
    """
    vocabulary = world_vocabulary()
    words = vocabulary.encode(text)
    if not words:
        raise ValueError('the review is empty: type one, such as "the plot was not dull but charming ."')
    return torch.tensor([[vocabulary.bos_id, *words, *vocabulary.encode(list(PROMPT))]])

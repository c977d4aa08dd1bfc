"""Objectives: what a model is asked for on a batch, as a loss and a count of right answers.

    answer_loss        one word at the end of each row       question answering, sentiment as a word
    label_loss         one class for each row                classification with a head, multiple choice
    next_token_loss    every next word                       pretraining

Each is the mean cross-entropy, -log p(right answer), in nats (Vaswani et al. 2017, section 5.4, without smoothing).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.tasks.dataset import Dataset


@dataclass
class Score:
    """What an objective says of one batch."""

    loss: Tensor  # scalar, mean over the batch
    correct: int  # right answers
    count: int  # answers


Objective = Callable[[nn.Module, Dataset], Score]


def answer_logits(model: nn.Module, batch: Dataset) -> Float[Tensor, "B V"]:
    """The scores of every word at the last real token of each row, the only one that the last block computes."""
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    last = (batch.padding_mask * columns).argmax(dim=1)  # [B]
    return model.lm_head(model.hidden(batch.tokens, batch.padding_mask, asked=last)[:, 0])


def answer_loss(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of the one answer word, read at the last real token."""
    return _score(answer_logits(model, batch), batch.targets)


def label_loss(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of a class, for a `SequenceClassifier`."""
    return _score(model(batch.tokens, batch.padding_mask), batch.targets)


def next_token_loss(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of each next word, in nats per word; padding asks nothing and is not asked for."""
    hidden = model.hidden(batch.tokens, batch.padding_mask)[:, :-1]  # [B, T - 1, d_model]
    asked = batch.padding_mask[:, :-1] & batch.padding_mask[:, 1:]  # [B, T - 1]
    return word_score(model, hidden[asked], batch.tokens[:, 1:][asked])  # only these meet the LM head


def word_score(model: nn.Module, hidden: Float[Tensor, "N d_model"], targets: Int[Tensor, "N"]) -> Score:
    """Cross-entropy of words, from the hidden states that should say them."""
    loss, correct = model.word_loss(hidden, targets)
    return Score(loss, int(correct), len(targets))


def _score(logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> Score:
    correct = int((logits.argmax(dim=-1) == targets).sum())
    return Score(F.cross_entropy(logits, targets), correct, len(targets))

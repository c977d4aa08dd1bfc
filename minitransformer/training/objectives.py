"""Objectives: what a model is asked for on a batch, as a loss and a count of right answers.

    answer_loss        one word at the end of each row       question answering, sentiment as a word
    label_loss         one class for each row                classification with a head, multiple choice
    answer_only        every word of an answer               tuning a language model on questions and answers
    next_token_loss    every next word                       pretraining

Each is the mean cross-entropy, -log p(right answer), in nats (Vaswani et al. 2017, section 5.4, without smoothing). A
target of -100 asks nothing: it counts neither in the mean nor in the accuracy.
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

    loss: Tensor  # scalar, mean over the answers; where none is asked for, a 0 that gradients pass
    correct: int  # right answers
    count: int  # answers


Objective = Callable[[nn.Module, Dataset], Score]


def answer_logits(model: nn.Module, batch: Dataset) -> Float[Tensor, "B V"]:
    """The scores of every word at the last real token of each row, the only one that the last block computes."""
    _check_reads_words(model, batch)
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    last = (batch.padding_mask * columns).argmax(dim=1)  # [B]
    return model.lm_head(model.hidden(batch.tokens, batch.padding_mask, asked=last)[:, 0])


def answer_loss(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of the one answer word, read at the last real token."""
    return _score(answer_logits(model, batch), batch.targets)


def label_loss(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of a class, for a `SequenceClassifier`.

    Raises:
        ValueError: the model does not give one score for each class, or a label is not one of them.
    """
    return _score(model(batch.tokens, batch.padding_mask), batch.targets)


def answer_only(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of the words of an answer, in nats per word; the text before it asks nothing.

    The targets are [N, T]: the word that should follow each position, or -100. The token that ends the turn is a word
    of the answer: a model that never learns it never stops.

    Raises:
        ValueError: the model is an encoder, or there is one target a row.
    """
    _check_says_next_words(model, batch)
    if batch.targets.shape != batch.tokens.shape:
        raise ValueError(
            f"targets {list(batch.targets.shape)} are not [N, T], the word that should follow each token of "
            f"{list(batch.tokens.shape)}; answer_loss is for one word a row"
        )
    asked = batch.targets != -100  # [B, T]
    return word_score(model, model.hidden(batch.tokens, batch.padding_mask)[asked], batch.targets[asked])


def next_token_loss(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of each next word, in nats per word; padding asks nothing and is not asked for.

    Raises:
        ValueError: the model is an encoder, which sees the word that it should say.
    """
    _check_says_next_words(model, batch)
    hidden = model.hidden(batch.tokens, batch.padding_mask)[:, :-1]  # [B, T - 1, d_model]
    asked = batch.padding_mask[:, :-1] & batch.padding_mask[:, 1:]  # [B, T - 1]
    return word_score(model, hidden[asked], batch.tokens[:, 1:][asked])  # only these meet the LM head


def word_score(model: nn.Module, hidden: Float[Tensor, "N d_model"], targets: Int[Tensor, "N"]) -> Score:
    """Cross-entropy of words, from the hidden states that should say them."""
    hidden, targets = _asked(hidden, targets, model.config.vocab_size)
    if len(targets) == 0:
        return Score(hidden.sum(), 0, 0)  # of no rows: 0
    loss, correct = model.word_loss(hidden, targets)
    return Score(loss, int(correct), len(targets))


def autocasting(objective: Objective, dtype: torch.dtype) -> Objective:
    """The objective with its matrix products in this type of 16 bits; sums, norms and losses stay in 32.

    Micikevicius et al. 2018, "Mixed Precision Training", sections 3.1 and 3.3; bfloat16 has the exponents of float32,
    so the loss needs no scaling (their section 3.2).
    """

    def cast(model: nn.Module, batch: Dataset) -> Score:
        with torch.autocast(batch.tokens.device.type, dtype):
            return objective(model, batch)

    return cast


def _score(scores: Float[Tensor, "*shape"], targets: Int[Tensor, "N"]) -> Score:
    if scores.dim() != 2:
        raise ValueError(
            f"scores [N, classes] are wanted, not {list(scores.shape)}: label_loss is for a SequenceClassifier"
        )
    scores, targets = _asked(scores, targets, scores.shape[1])
    loss = F.cross_entropy(scores, targets) if len(targets) else scores.sum()  # of no rows: 0
    return Score(loss, int((scores.argmax(dim=-1) == targets).sum()), len(targets))


def _asked(rows: Tensor, targets: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The rows that are asked something, and their targets; raise ValueError for a target that is none of n choices."""
    if targets.is_floating_point() or targets.shape != rows.shape[:1]:
        raise ValueError(f"targets must be whole numbers, [{len(rows)}], not {targets.dtype} {list(targets.shape)}")
    asked = targets != -100  # as PyTorch has it
    rows, targets = (rows, targets) if bool(asked.all()) else (rows[asked], targets[asked])
    wrong = targets[(targets < 0) | (targets >= n)]
    if len(wrong):
        raise ValueError(f"the target {int(wrong[0])} is none of the {n} classes or words; only -100 asks nothing")
    return rows, targets.long()


def _check_reads_words(model: nn.Module, batch: Dataset) -> None:
    if not hasattr(model, "hidden") or batch.tokens.dim() != 2:
        raise ValueError(
            f"a language model and one text a row are wanted, tokens [N, T], not a {type(model).__name__} and "
            f"{list(batch.tokens.shape)}; label_loss is for classes and multiple choice"
        )


def _check_says_next_words(model: nn.Module, batch: Dataset) -> None:
    _check_reads_words(model, batch)
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    if not getattr(next(configs, None), "causal", True):
        raise ValueError("an encoder sees the next word and would learn to copy it; take a model with causal=True")

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
from minitransformer.transformer import check_targets


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
    logits = answer_logits(model, batch)
    return _score(logits, batch.targets, logits.shape[1], _class_loss)


def label_loss(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of a class, for a `SequenceClassifier`.

    Raises:
        ValueError: the model does not give one score for each class, or a label is not one of them.
    """
    scores = model(batch.tokens, batch.padding_mask)
    if scores.dim() != 2:
        raise ValueError(f"label_loss is for a SequenceClassifier: [N, classes] are wanted, not {list(scores.shape)}")
    return _score(scores, batch.targets, scores.shape[1], _class_loss)


def answer_only(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of the words of an answer, in nats per word; the text before it asks nothing.

    The targets are [N, T]: the word that should follow each position, or -100. The token that ends the turn is a word
    of the answer: a model that never learns it never stops.

    Raises:
        ValueError: the model is an encoder, there is one target a row, or padding is asked for a word.
    """
    _check_says_next_words(model, batch)
    check_targets(batch.targets, batch.tokens, batch.padding_mask, model.config.vocab_size)
    asked = batch.targets != -100  # [B, T]
    return _mean(model.hidden(batch.tokens, batch.padding_mask)[asked], batch.targets[asked], model.word_loss)


def next_token_loss(model: nn.Module, batch: Dataset) -> Score:
    """Cross-entropy of each next word, in nats per word; padding asks nothing and is not asked for.

    Raises:
        ValueError: the model is an encoder, which sees the word that it should say.
    """
    _check_says_next_words(model, batch)
    hidden = model.hidden(batch.tokens, batch.padding_mask)[:, :-1]  # [B, T - 1, d_model]
    asked = batch.padding_mask[:, :-1] & batch.padding_mask[:, 1:]  # [B, T - 1]
    return _mean(hidden[asked], batch.tokens[:, 1:][asked], model.word_loss)  # only these meet the LM head


def autocasting(objective: Objective, dtype: torch.dtype) -> Objective:
    """The objective with its matrix products in this type of 16 bits; sums, norms and losses stay in 32.

    Micikevicius et al. 2018, "Mixed Precision Training", sections 3.1 and 3.3; bfloat16 has the exponents of float32,
    so the loss needs no scaling (their section 3.2).
    """

    def cast(model: nn.Module, batch: Dataset) -> Score:
        with torch.autocast(batch.tokens.device.type, dtype):
            return objective(model, batch)

    return cast


def _class_loss(scores: Float[Tensor, "N C"], targets: Int[Tensor, "N"]) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    return F.cross_entropy(scores, targets), (scores.argmax(dim=-1) == targets).sum()


def _score(rows: Tensor, targets: Tensor, n: int, loss_of: Callable) -> Score:
    """The score of the rows that are asked something; raise ValueError for a target that is none of n choices."""
    if targets.is_floating_point() or targets.shape != rows.shape[:1]:
        raise ValueError(f"targets must be whole numbers, [{len(rows)}], not {targets.dtype} {list(targets.shape)}")
    asked = targets != -100  # as PyTorch has it
    rows, targets = (rows, targets) if bool(asked.all()) else (rows[asked], targets[asked])
    wrong = targets[(targets < 0) | (targets >= n)]
    if len(wrong):
        raise ValueError(f"the target {int(wrong[0])} is none of the {n} classes or words; only -100 asks nothing")
    return _mean(rows, targets, loss_of)


def _mean(rows: Tensor, targets: Tensor, loss_of: Callable) -> Score:
    """The score of rows that all ask something, and for one of the choices."""
    loss, correct = loss_of(rows, targets.long()) if len(targets) else (rows.sum(), 0)  # of no rows: 0
    return Score(loss, int(correct), len(targets))


def _check_reads_words(model: nn.Module, batch: Dataset) -> None:
    kind, shape = type(model).__name__, list(batch.tokens.shape)
    if not hasattr(model, "hidden") or len(shape) != 2:
        raise ValueError(f"a language model and tokens [N, T] are wanted, not a {kind} and {shape}; or take label_loss")


def _check_says_next_words(model: nn.Module, batch: Dataset) -> None:
    _check_reads_words(model, batch)
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    if not getattr(next(configs, None), "causal", True):
        raise ValueError("an encoder sees the next word and would learn to copy it; take a model with causal=True")

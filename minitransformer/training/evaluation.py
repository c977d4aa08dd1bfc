"""Evaluation: a model's mean loss and accuracy on a data set, and its answers, with dropout off."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minitransformer.config import check_whole
from minitransformer.modes import evaluation_mode
from minitransformer.tasks.dataset import Dataset, by_length
from minitransformer.training.distributed import n_processes, rank, total
from minitransformer.training.objectives import Objective, answer_logits, answer_loss


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, objective: Objective = answer_loss, batch_size: int = 64
) -> dict[str, float]:
    """Mean loss and accuracy over a dataset, with dropout off; every module's mode is restored.

    Rows of like length share a batch, so that little padding is computed. Several processes take turns with the
    batches, so all of them must call it; each gets the result of all.

    Raises:
        ValueError: there is nothing to score, or a batch_size below 1.
    """
    loss = correct = count = 0.0
    with evaluation_mode(model):
        for rows in _batches(dataset, batch_size)[rank() :: n_processes()]:
            score = objective(model, dataset.rows(rows).trimmed())
            if score.count:  # the mean loss over no answers is NaN
                loss += score.loss.item() * score.count
                correct += score.correct
                count += score.count
    loss, correct, count = total(loss, correct, count)
    if count == 0:
        raise ValueError("the data set asks nothing: it is empty, every label is -100, or no row has a next word")
    return {"loss": loss / count, "accuracy": correct / count}


def _batches(dataset: Dataset, batch_size: int) -> Sequence[Int[Tensor, "b"]]:
    """The rows of each batch, those of like length together."""
    check_whole("batch_size", batch_size, 1)
    return by_length(dataset).split(batch_size) if len(dataset) else ()


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Dataset, choices: list[int] | None = None, batch_size: int = 64
) -> Int[Tensor, "N"]:
    """The answer word of each row, in the order of the rows: the best of all words, or of `choices` only.

    Raises:
        ValueError: no choice, one that is no word of the model, or a batch_size below 1.
    """
    if choices is not None and not choices:
        raise ValueError("no choices: give at least one word, or None for all")
    answers = dataset.targets.new_empty(len(dataset))
    with evaluation_mode(model):
        for rows in _batches(dataset, batch_size):
            logits = answer_logits(model, dataset.rows(rows).trimmed())
            for choice in choices or ():
                check_whole("choice", choice, 0, below=logits.shape[1])
            among = torch.arange(logits.shape[1]) if choices is None else torch.tensor(choices)
            answers[rows] = among.to(logits.device)[logits[:, among].argmax(dim=-1)]
    return answers

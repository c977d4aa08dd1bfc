"""The baseline that counts words: logistic regression on a bag of words.

It sees which words occur, not in which order, and so cannot know what "not" and "but" refer to.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from minitransformer.tasks.dataset import Dataset, Task


def bag_of_words(dataset: Dataset, vocab_size: int) -> Float[Tensor, "N V"]:
    """How often each word occurs in each row; padding is not counted."""
    counts = torch.zeros(len(dataset), vocab_size)
    return counts.scatter_add_(1, dataset.tokens, dataset.padding_mask.float())


def class_index(dataset: Dataset, task: Task) -> Int[Tensor, " N"]:
    """The targets as indices into `task.answers`."""
    return (dataset.targets[:, None] == task.answer_ids[None, :]).int().argmax(dim=1)


def bag_of_words_accuracy(task: Task, steps: int = 200, weight_decay: float = 1e-3) -> dict[str, float]:
    """Train on the training split by full-batch AdamW from zero; return the accuracy on each split."""
    weight = torch.zeros(len(task.vocabulary), len(task.answers), requires_grad=True)
    bias = torch.zeros(len(task.answers), requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=0.05, weight_decay=weight_decay)
    counts, classes = bag_of_words(task.train, len(task.vocabulary)), class_index(task.train, task)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(counts @ weight + bias, classes).backward()
        optimizer.step()
    accuracy = {}
    for name, split in (("train", task.train), ("validation", task.validation), ("test", task.test)):
        scores = bag_of_words(split, len(task.vocabulary)) @ weight + bias
        accuracy[name] = (scores.argmax(dim=1) == class_index(split, task)).float().mean().item()
    return accuracy

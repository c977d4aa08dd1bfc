"""Batches of rows of like length: less padding, so less time, where real texts are of all lengths."""

from collections.abc import Callable
from functools import lru_cache

import torch

from minitransformer.tasks.dataset import Dataset


def batches_of_like_length(
    dataset: Dataset, batch_size: int = 32, seed: int = 0, window: int = 8
) -> Callable[[int], Dataset]:
    """A function from the step to a batch, for `fit`: each epoch walks the rows once, in an order of its own.

    The rows are shuffled; those of `window` batches at a time are sorted by length and cut into batches; the batches
    are shuffled. So a batch's rows are of like length, but no two epochs have the same batches. Rows that fill no
    batch wait for another epoch.

    Raises:
        ValueError: the data set does not fill one batch, or the window is below 1.
    """
    lengths = dataset.lengths
    per_epoch = len(dataset) // batch_size
    if per_epoch < 1 or window < 1:
        raise ValueError(
            f"{len(dataset)} rows, batch_size={batch_size}, window={window}: give at least one batch of rows and a "
            f"window of at least 1"
        )

    @lru_cache(maxsize=1)
    def epoch_batches(epoch: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(dataset), generator=generator)[: per_epoch * batch_size]
        windows = [rows[lengths[rows].argsort(stable=True)] for rows in order.split(window * batch_size)]
        batches = [batch for rows in windows for batch in rows.split(batch_size)]
        return [batches[i] for i in torch.randperm(per_epoch, generator=generator)]

    def batch_at(step: int) -> Dataset:
        epoch, position = divmod(step, per_epoch)
        return dataset.rows(epoch_batches(epoch)[position]).trimmed()

    return batch_at

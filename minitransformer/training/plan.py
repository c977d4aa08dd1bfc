"""The plan of a run: which rows, which learning rate and which dropout each step has.

All are functions of the step and the seed alone, so a run that goes on after a stop has to keep none of them.

Sources: warm-up, Vaswani et al. 2017, section 5.3; cosine decay, Loshchilov & Hutter 2017, equation 5 without restarts.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from minitransformer.randomness import generator_of
from minitransformer.tasks.dataset import Dataset
from minitransformer.training.distributed import n_processes, rank


def batches(
    train: Dataset | Callable[[int], Dataset], steps: range, batch_size: int, seed: int, devices: Iterable[torch.device]
) -> Iterator[tuple[int, Dataset]]:
    """Each step with its batch. Of a data set, each epoch walks the rows in an order that (seed, epoch) decide.

    What is drawn in a step, such as dropout, follows from (seed, step), elsewhere in each process. A function that
    gives no data set, or an empty one, is a ValueError.
    """
    ordered = None  # the epoch whose order is at hand
    for step in steps:
        for device in devices:
            generator_of(device).manual_seed((seed * 1_000_003 + step) * n_processes() + rank())
        if callable(train):
            batch = train(step)
            if not isinstance(batch, Dataset) or len(batch) == 0:
                raise ValueError(f"the batch of step {step} is empty, or a {type(batch).__name__}; give a Dataset")
        else:
            epoch, position = divmod(step, max(1, len(train) // batch_size))
            if epoch != ordered:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                order, ordered = torch.randperm(len(train), generator=generator), epoch
            batch = train.rows(order[position * batch_size : (position + 1) * batch_size]).trimmed()
        yield step, batch


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str | Callable[[int], float]) -> float:
    """The share of the peak that `step` (from 0) uses: linear warm-up, then decay; a function says it all itself."""
    if callable(schedule):
        return schedule(step)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)  # from 0 at the peak towards 1
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 if schedule == "constant" else 1.0 - done


def set_rates(optimizer: torch.optim.Optimizer, peaks: list[float], factor: float) -> None:
    """Give each of the optimizer's groups this share of its peak rate."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor

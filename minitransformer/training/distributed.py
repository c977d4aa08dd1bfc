"""Many processes, one run: each computes its share of every batch, and PyTorch averages the gradients.

    torchrun --nproc-per-node 2 -m peft compare --task sentiment --out results

Every process holds the whole model and draws the same batches; of each it takes every n-th row. The gradients meet in
an all-reduce (`DistributedDataParallel`), so all take the same step, and n processes with a share of the batch end
where one process with all of it ends, up to rounding. What travels is a number for each *trained* parameter: this is
why parameter-efficient methods spread over many machines so easily.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 3.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minitransformer.tasks.dataset import Dataset
from minitransformer.training.objectives import Objective, Score


def n_processes() -> int:
    """How many processes share this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if n_processes() > 1 else 0


def is_writer() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


def share(batch: Dataset) -> Dataset:
    """The rows of a batch that are for this process, every n-th; of fewer rows than processes, the last get none."""
    return batch.rows(slice(rank(), None, n_processes()))


def total(*values: float) -> list[float]:
    """The sums of these numbers over all processes; every process must call it."""
    if n_processes() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # nccl alone sends no tensor of the CPU
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


class Learner(nn.Module):
    """A model with its objective, as one module: what `DistributedDataParallel` can watch from input to loss."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Dataset) -> dict:
        """The entries of the score."""
        return vars(self.objective(self.model, batch))


def data_parallel(model: nn.Module, objective: Objective) -> Objective:
    """The objective for the share of each process, whose gradients are averaged over all; itself for a single one.

    A share may ask for fewer words than another, or for nothing, so each mean counts by its number of answers: the loss
    has the *value* of the mean over the whole batch, and the *gradient* of this process's part of it. A process without
    rows takes the first one, which then counts for nothing, since all have to exchange their gradients.
    """
    if n_processes() == 1:
        return objective
    parallel = DistributedDataParallel(Learner(model, objective), find_unused_parameters=True)

    def of_the_share(_: nn.Module, batch: Dataset) -> Score:
        own = share(batch)
        score = Score(**parallel((own if len(own) else batch.rows(slice(0, 1))).trimmed()))
        correct, count = (score.correct, score.count) if len(own) else (0, 0)
        summed, all_correct, all_count = total(score.loss.item() * count, correct, count)
        part = score.loss * (count * n_processes() / max(1, all_count))
        return Score(part + (summed / max(1, all_count) - part).detach(), int(all_correct), int(all_count))

    return of_the_share

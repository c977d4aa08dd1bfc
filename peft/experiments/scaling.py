"""What a training step costs on many machines: a model of few terms, and which of them were measured.

n processes share a batch of B rows (`training/distributed.py`). Each computes on B / n of them, then all
exchange the gradients of the t trained parameters in a ring:

    seconds(n)  = compute / n + 2 (n - 1) latency + 2 (n - 1) / n * 4 t / bandwidth
    memory(n)   = 4 N + 12 t + activations / n                        weights, gradient and Adam's two means; float32

Source: Patarasuk & Yuan 2009, "Bandwidth Optimal All-reduce Algorithms", section 3.1: each process sends
2 (n - 1) / n times the bytes, whatever n is, in 2 (n - 1) messages.

    torchrun --nproc-per-node 2 -m peft.experiments.scaling        measures the link between the processes, prints JSON

Differs from reality: the exchange is not hidden behind the backward pass (DDP hides part of it), all links are alike,
and a batch that is cut into ever smaller shares is assumed to compute as well as a whole one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from minitransformer.training.distributed import is_writer, n_processes
from peft.experiments.processes import launched_together

SIZES = (2**12, 2**16, 2**20, 2**22, 2**24)  # bytes


@dataclass(frozen=True)
class Link:
    """What lies between two processes.

    Attributes:
        latency: seconds a message takes however short it is.
        bandwidth: bytes a second.
        measured: whether somebody measured them, or they are somebody's data sheet.
    """

    latency: float
    bandwidth: float
    measured: bool


@dataclass(frozen=True)
class Step:
    """A training step of one process with the whole batch.

    Attributes:
        seconds: of forward, backward and optimizer.
        weights: N, the parameters of the model, the method's included.
        trained: t of them.
        activation_bytes: kept for the backward pass of the whole batch.
        measured: whether seconds and activation_bytes were measured.
    """

    seconds: float
    weights: int
    trained: int
    activation_bytes: int
    measured: bool = True


def ring_bytes(trained: int, n: int) -> float:
    """What each of n processes sends in a step: 2 (n - 1) / n times the float32 gradients, in bytes."""
    return 2 * (n - 1) / n * 4 * trained


def exchange_seconds(trained: int, n: int, link: Link) -> float:
    """The all-reduce of a step; 0 for a single process."""
    return 2 * (n - 1) * link.latency + ring_bytes(trained, n) / link.bandwidth


def step_seconds(step: Step, n: int, link: Link) -> float:
    """A step on n processes, the batch shared by them."""
    return step.seconds / n + exchange_seconds(step.trained, n, link)


def memory_bytes(step: Step, n: int) -> float:
    """What one of n processes holds."""
    return 4 * step.weights + 12 * step.trained + step.activation_bytes / n


def provenance(step: Step, link: Link) -> dict[str, str]:
    """Of each term of the model: measured, assumed, or counted."""
    word = {True: "measured", False: "assumed"}
    return {
        "compute": word[step.measured],
        "activations": word[step.measured],
        "latency": word[link.measured],
        "bandwidth": word[link.measured],
        "bytes of gradients": "counted: 4 for each trained parameter",
        "weights, gradients, Adam": "counted: 4 N + 12 t bytes",
    }


def fitted_link(seconds: dict[int, float], n: int) -> Link:
    """Latency and bandwidth from the times of all-reduces of different sizes, in bytes, among n processes.

    The shortest time gives the latency, the slope between the two largest sizes the bandwidth.

    Raises:
        ValueError: fewer than two sizes, or times that do not grow with the size.
    """
    sizes = sorted(seconds)
    if len(sizes) < 2 or seconds[sizes[-1]] <= seconds[sizes[-2]]:
        raise ValueError(f"the times do not grow with the size, so they give no bandwidth: {seconds}; measure again")
    slope = (seconds[sizes[-1]] - seconds[sizes[-2]]) / (sizes[-1] - sizes[-2])
    return Link(latency=min(seconds.values()) / (2 * (n - 1)), bandwidth=2 * (n - 1) / n / slope, measured=True)


def all_reduce_times(rounds: int = 15) -> dict[int, float]:
    """Median seconds of an all-reduce of each of `SIZES`, among the processes that run this together."""
    found = {}
    for size in SIZES:
        tensor, times = torch.zeros(size // 4), []
        for _ in range(rounds + 2):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        found[size] = statistics.median(times[2:])
    return found


def measured_link(n: int = 2) -> Link:
    """Start n processes on this machine, and measure what lies between them (PyTorch's gloo).

    Raises:
        RuntimeError: they did not come to an end; the message holds what they printed.
    """
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m", __name__]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"the processes failed: {done.stderr[-1000:]}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return fitted_link({int(size): seconds for size, seconds in json.loads(line).items()}, n)


if __name__ == "__main__":
    argparse.ArgumentParser("torchrun -m peft.experiments.scaling", description=__doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(1)
    with launched_together():
        if n_processes() == 1:
            sys.exit("there is nothing between one process: torchrun --nproc-per-node 2 -m peft.experiments.scaling")
        times = all_reduce_times()
        if is_writer():
            print(json.dumps(times), flush=True)

"""What both sides of the benchmark share: the shape, the batches, and how a worker is asked for a time.

A worker is a process that holds one library. It reads one line of JSON for each request and answers with one:

    {"prepare": "LoRA q,v"}    builds the model and warms it up      -> {}, or {"missing": why} where it has no such job
    {"run": "LoRA q,v"}        does the job, a short one repeatedly  -> {"seconds": …} of one time
    {"peak": "LoRA q,v"}       does it a few times                   -> {"before": MiB, "peak": MiB} of the process

This file needs PyTorch only, since one of the workers lives where neither of our packages can be imported.
"""

import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

SIZES = {"vocab_size": 2048, "d_model": 256, "n_layers": 6, "n_heads": 8, "d_ff": 1024}
BATCH, LENGTH, MAX_LEN = 16, 128, 256
RATE = 1e-4
RANK, ALPHA, N = 8, 16, 16
NEW_TOKENS, BEGINNING = 64, 16
ENOUGH = 0.4  # seconds

Job = Callable[[], object]


def tokens(rows: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random words, the same on both sides; 0, 1 and 2 have a meaning in OPT and are left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=generator)


def mixed_lengths() -> Tensor:
    """A padding mask [BATCH, LENGTH], True = a real token: rows of 16 to 128 tokens, padded on the left."""
    lengths = torch.linspace(LENGTH // 8, LENGTH, BATCH).round().long()
    return torch.arange(LENGTH) >= (LENGTH - lengths)[:, None]


def stepper(loss: Callable[[], Tensor], trained: list[Tensor]) -> Job:
    """One training step with AdamW; where nothing is trained, forward and backward alone."""
    optimizer = torch.optim.AdamW(trained, lr=RATE) if trained else None

    def step() -> None:
        loss().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def without_gradient(function: Callable[[], object]) -> Job:
    """The function in `torch.inference_mode`."""

    def run() -> None:
        with torch.inference_mode():
            function()

    return run


def mebibytes() -> float:
    """The most memory this process has held so far, in MiB (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def timed(job: Job) -> float:
    """The seconds that the job takes: the mean over as many times as fill `ENOUGH`, so that no short one is chance."""
    began, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - began < ENOUGH:
        job()
        times += 1
    return (time.perf_counter() - began) / times


def serve(jobs: dict[str, Callable[[], Job]], threads: int, versions: str) -> None:
    """Answer requests until the input ends; the first line says which versions answer."""
    torch.set_num_threads(threads)
    ready: dict[str, Job] = {}
    print(json.dumps({"versions": f"{versions}, torch {torch.__version__}"}), flush=True)
    for line in sys.stdin:
        ((order, name),) = json.loads(line).items()
        if name not in jobs:
            answer: dict = {"missing": "this library has none"}
        elif order == "prepare":
            ready[name] = jobs[name]()
            for _ in range(3):
                ready[name]()
            answer = {}
        elif order == "run":
            answer = {"seconds": timed(ready[name])}
        else:
            job, before = jobs[name](), mebibytes()
            for _ in range(3):
                job()
            answer = {"before": before, "peak": mebibytes()}
        print(json.dumps(answer), flush=True)

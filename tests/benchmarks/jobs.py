"""What both sides of the benchmark share: the shape, the batches, and how a worker is asked for a time.

A worker is a process that has imported one library. It reads one line of JSON for each request, answers with one, and
forks for each job, so that every job has a fresh process and none waits for imports:

    {"prepare": "fit: LoRA q,v"}    builds the model, warms it up      -> {}, or {"missing": why}: there is no such job
    {"run": "fit: LoRA q,v"}        does it, a short one repeatedly    -> {"seconds": …} of one time
    {"end": "fit: LoRA q,v"}        ends the process                   -> {"peak": MiB}, the most that it held

This file needs PyTorch only, since one of the workers lives where neither of our packages can be imported.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"vocab_size": 2048, "d_model": 256, "n_layers": 6, "n_heads": 8, "d_ff": 1024}
BATCH, LENGTH, MAX_LEN = 16, 128, 256
RATE = 1e-4
RANK, ALPHA, N = 8, 16, 16
NEW_TOKENS, BEGINNING = 64, 16
WARM_UP = 2  # times
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


def next_word_loss(logits: Tensor, batch: Tensor) -> Tensor:
    """Cross-entropy of every next word in nats. Positions in front of the text, as of a prompt, are not asked."""
    return F.cross_entropy(logits[:, -LENGTH:-1].flatten(0, 1), batch[:, 1:].flatten())


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What a method trains."""
    return [p for p in model.parameters() if p.requires_grad]


def plain_loop(model: nn.Module, loss: Callable[[], Tensor]) -> Job:
    """A step of a training loop as a reader writes it; where nothing is trained, forward and backward alone."""
    optimizer = torch.optim.AdamW(trained(model), lr=RATE) if trained(model) else None

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


def say(**answer: object) -> None:
    """One line of JSON."""
    print(json.dumps(answer), flush=True)


def work(job: Job) -> None:
    """Do one job as often as it is asked for."""
    for _ in range(WARM_UP):
        job()
    say()
    for line in sys.stdin:
        if "end" in json.loads(line):
            say(peak=mebibytes())
            return
        say(seconds=timed(job))


def serve(jobs: dict[str, Callable[[], Job]], threads: int, versions: str) -> None:
    """Answer requests until the input ends; the first line says which versions answer.

    Nothing is computed before the fork: a process that has started OpenMP's threads may not fork.
    """
    say(versions=f"{versions}, torch {torch.__version__}")
    for line in sys.stdin:
        name = json.loads(line)["prepare"]
        if name not in jobs:
            say(missing="this library has none")
        elif os.fork() == 0:
            torch.set_num_threads(threads)
            work(jobs[name]())
            return
        elif os.wait()[1]:
            sys.exit(f"{name} failed; what is printed above says why")

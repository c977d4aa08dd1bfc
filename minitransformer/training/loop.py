"""One training loop for pretraining, full fine-tuning and every PEFT method.

The loop does not know what it trains: it hands the optimizer the tensors with `requires_grad`. Beside it stand what is
asked (`objectives.py`), the rows and the rate of each step (`plan.py`), what is recorded (`history.py`) or refused
(`checks.py`), how a killed run goes on (`resume.py`, `identity.py`), how processes share one (`distributed.py`).

Sources: AdamW, Loshchilov & Hutter 2019, algorithm 2; clipping by the global norm, Pascanu et al. 2013, algorithm 1.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from tqdm import tqdm

from minitransformer.modes import modes_restored, undone
from minitransformer.randomness import random_state_restored
from minitransformer.tasks.dataset import Dataset
from minitransformer.training.checks import (
    check_asked,
    check_finite,
    check_optimizer,
    check_options,
    check_score,
    trainable_of,
)
from minitransformer.training.distributed import data_parallel, is_writer
from minitransformer.training.evaluation import evaluate
from minitransformer.training.history import History
from minitransformer.training.objectives import Objective, Score, answer_loss, autocasting
from minitransformer.training.plan import batches, learning_rate_factor, set_rates
from minitransformer.training.resume import RunFile


def fit(
    model: nn.Module, train: Dataset | Callable[[int], Dataset], validation: Dataset | None = None, *, steps: int,
    learning_rate: float | None = None, batch_size: int | None = None, objective: Objective = answer_loss,
    warmup: int | None = None, schedule: str | Callable[[int], float] = "cosine", weight_decay: float | None = None,
    betas: tuple[float, float] | None = None, clip: float | None = 1.0, accumulate: int = 1,
    autocast: torch.dtype | None = None, validate_every: int | None = None,
    optimizer: torch.optim.Optimizer | None = None, seed: int = 0, progress: bool = True, description: str = "fit",
    checkpoint: str | Path | None = None, every: int | None = None,
) -> History:  # fmt: skip
    """Train the tensors of `model` that require a gradient, in place.

    Args:
        model: whatever the objective can call; its trainable tensors are those with `requires_grad`.
        train: a dataset, walked in a fresh random order each epoch, or a function from the step to a batch.
        validation: scored every `validate_every` steps and at the end; None there: only at the end.
        steps: optimizer steps.
        learning_rate: peak of the schedule, by default 1e-3.
        batch_size: rows of a step, where `train` is a dataset; by default 32.
        objective: from model and batch to a `Score`.
        warmup: steps of linear warm-up; by default a twentieth of all, at most 100.
        schedule: "cosine" or "linear" decay to 0, or "constant"; or a function from the step to the share of the peak.
        weight_decay, betas: of AdamW, by default 0 and (0.9, 0.999).
        clip: largest global gradient norm; None never clips.
        accumulate: parts in which a batch is computed, one after the other: the memory of one part, the step of all.
        autocast: a type of 16 bits for the products, such as torch.bfloat16; what is trained stays in 32 bits.
        optimizer: instead of AdamW. It must hold every trainable tensor; the rates of its groups are the peaks.
        seed: of the data order and of dropout. The caller's random state is left alone.
        progress, description: whether to show a bar with loss and accuracy, and its caption.
        checkpoint: a file for the state of the run, written each `every` steps, by default a twentieth of all. The
            same call again, with the model as it was at the start, goes on from it and ends in the same bits; after
            the end it returns at once. `identity.py` says how a run is known again, functions in its settings too.

    Raises:
        ValueError: nothing to train, a trainable tensor of 16 bits, merged, or not held by the optimizer, a bad
            option, data that ask nothing, or a checkpoint that is damaged or belongs to another run.
        FloatingPointError: a loss, a gradient or a weight is NaN or infinite; the weights are those before that step.
        OSError: the checkpoint cannot be written; noticed before the first step.
    """
    check_options(given := dict(locals()))
    trainable = trainable_of(model)
    batch_size, warmup = batch_size or 32, min(100, steps // 20) if warmup is None else warmup
    if optimizer is None:
        rate = 1e-3 if learning_rate is None else learning_rate
        optimizer = torch.optim.AdamW(trainable.values(), rate, betas or (0.9, 0.999), weight_decay=weight_decay or 0.0)
    check_optimizer(model, optimizer)
    given["objective"] = objective = objective if autocast is None else autocasting(objective, autocast)
    decisive = ("train", "validation", "steps", "objective", "schedule", "clip", "accumulate", "validate_every", "seed")
    options = {name: given[name] for name in decisive} | {"batch_size": batch_size, "warmup": warmup}
    file = RunFile(checkpoint, model, optimizer, options)
    history, devices = file.restore(), {p.device for p in model.parameters()}
    peaks = [group["lr"] for group in optimizer.param_groups]
    style = {"file": sys.stdout, "ncols": 100, "mininterval": 0.5, "disable": not (progress and is_writer())}
    bar = tqdm(total=steps, initial=len(history.loss), desc=description, **style)
    with modes_restored(model), random_state_restored(*devices), bar, ExitStack() as afterwards:
        afterwards.callback(set_rates, optimizer, peaks, 1.0)
        learner, own = data_parallel(model, objective), list(trainable.values())
        for step, batch in batches(train, range(len(history.loss), steps), batch_size, seed, devices):
            began = time.perf_counter()
            set_rates(optimizer, peaks, learning_rate_factor(step, steps, warmup, schedule))
            model.train()
            score, norm = training_step(model, batch, learner, optimizer, own, clip, step, accumulate)
            history.note(loss=score.loss.item(), accuracy=score.correct / score.count, gradient_norm=norm)
            history.note(learning_rate=optimizer.param_groups[0]["lr"])
            history.seconds += time.perf_counter() - began
            loss, accuracy = fmean(history.loss[-20:]), fmean(history.accuracy[-20:])
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
            bar.update()
            done, last = step + 1, step + 1 == steps
            if validation is not None and (last or done % (validate_every or steps) == 0):
                now = evaluate(model, validation, objective)
                history.note(validation_step=done, validation_loss=now["loss"], validation_accuracy=now["accuracy"])
            if last or done % (every or max(1, steps // 20)) == 0:
                file.save(history)
    return history


def training_step(
    model: nn.Module, batch: Dataset, objective: Objective, optimizer: torch.optim.Optimizer,
    trainable: list[nn.Parameter], clip: float | None, step: int, accumulate: int = 1,
) -> tuple[Score, float]:  # fmt: skip
    """Forward pass, backward pass, clip, step. Returns the score and the gradient norm before clipping.

    Raises, and then weights and buffers are those before the step:
        ValueError: nothing is asked, no trainable tensor has a part in the loss, or the objective gives no `Score`.
        FloatingPointError: the loss, the gradient, or a weight after the step is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    try:
        with undone(list(model.buffers())):
            score = backward(model, batch, objective, trainable, accumulate, step)
            norm = nn.utils.clip_grad_norm_(trainable, math.inf if clip is None else clip).item()
            check_finite("gradient norm", norm, step)
            with undone(trainable):
                optimizer.step()
                check_finite("norm of the new weights", nn.utils.get_total_norm(trainable).item(), step)
    finally:
        optimizer.zero_grad(set_to_none=True)  # no gradient outlives its step
    return score, norm


def backward(
    model: nn.Module, batch: Dataset, objective: Objective, trainable: list[nn.Parameter], parts: int, step: int
) -> Score:
    """The gradient of the mean over all answers of the batch, part by part; returns the score of all.

    After each part the gradient is the mean over the answers so far: a part counts by its answers, not by its rows, or
    short answers would weigh more than long ones.
    """
    loss, correct, count = 0.0, 0, 0
    for part in [batch] if parts == 1 else batch.parts(parts):
        score = objective(model, part)
        check_score(score, step)
        share = score.count / max(1, count + score.count)  # of this part in what is there
        for p in trainable if count else ():
            if p.grad is not None:
                p.grad.mul_(1 - share)
        (score.loss * share).backward()
        loss = loss * (1 - share) + score.loss.detach() * share
        correct, count = correct + score.correct, count + score.count
    check_asked(count, step)
    return Score(loss, correct, count)

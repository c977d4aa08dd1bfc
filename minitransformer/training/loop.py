"""One training loop for pretraining, full fine-tuning and every PEFT method.

The loop does not know what it trains: it hands the optimizer the tensors with `requires_grad`. Beside it stand what is
asked of the model (`objectives.py`), the rows and the rate of each step (`plan.py`), what is recorded (`progress.py`),
what is refused (`checks.py`), how a killed run goes on (`resume.py`) and how processes share one (`distributed.py`).

Sources: AdamW, Loshchilov & Hutter 2019, algorithm 2; clipping by the global norm, Pascanu et al. 2013, algorithm 1.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minitransformer.tasks.dataset import Dataset
from minitransformer.training.checks import check_finite, check_optimizer, check_options, check_reached, trainable_of
from minitransformer.training.distributed import data_parallel
from minitransformer.training.evaluation import evaluate
from minitransformer.training.objectives import Objective, Score, answer_loss
from minitransformer.training.plan import batches, is_due, learning_rate_factor, left_as_found, set_rates
from minitransformer.training.progress import History, ProgressBar, RunState
from minitransformer.training.resume import RunFile, settings_of


def fit(
    model: nn.Module, train: Dataset | Callable[[int], Dataset], validation: Dataset | None = None, *, steps: int,
    learning_rate: float = 1e-3, batch_size: int = 32, objective: Objective = answer_loss, warmup: int | None = None,
    schedule: str | Callable[[int], float] = "cosine", weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999), clip: float | None = 1.0, validate_every: int | None = None,
    keep: str = "last", optimizer: torch.optim.Optimizer | None = None, seed: int = 0, progress: bool = True,
    description: str = "fit", checkpoint: str | Path | None = None, every: int | None = None,
) -> History:  # fmt: skip
    """Train the tensors of `model` that require a gradient, in place.

    Args:
        model: whatever the objective can call; its trainable tensors are those with `requires_grad`.
        train: a dataset, walked in a fresh random order each epoch, or a function from the step to a batch.
        validation: scored every `validate_every` steps and at the end; None there: only at the end.
        steps: optimizer steps.
        learning_rate: peak of the schedule. With an `optimizer` of your own its groups' rates are the peaks.
        batch_size: rows a step, where `train` is a dataset.
        objective: from model and batch to a `Score`.
        warmup: steps of linear warm-up; by default a twentieth of all, at most 100.
        schedule: what follows it: "cosine" or "linear" decay to 0, or "constant"; or a function from the step to the
            share of the peak.
        weight_decay, betas: of AdamW.
        clip: largest global gradient norm; None never clips.
        keep: "last" weights, or the "best" ones by validation accuracy (by loss where that ties).
        optimizer: instead of AdamW. It must hold every trainable tensor.
        seed: of the data order and of dropout. The caller's random state is left alone. (Of several processes each has
            a dropout of its own, which a resumed run draws anew.)
        progress, description: whether to show a bar with loss and accuracy, and its caption.
        checkpoint: a file that holds the state of the run. If it is there, the run goes on from it, and ends in the
            same bits as one that was never interrupted; give the same model, data and settings. It stays when the run
            is over: the same call again then returns at once.
        every: steps between two writes of that file; by default a twentieth of all.

    Raises:
        ValueError: nothing to train, a trainable tensor that the optimizer does not hold, a bad option, or a
            checkpoint that is damaged or belongs to another run.
        FloatingPointError: a loss or a gradient is NaN or infinite; the weights are those before that step.
    """
    check_options(steps, batch_size, warmup, clip, schedule, keep, validation, validate_every, checkpoint, every)
    trainable = trainable_of(model)
    if optimizer is None:
        optimizer = torch.optim.AdamW(trainable.values(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    check_optimizer(model, optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    warmup = min(100, steps // 20) if warmup is None else warmup
    run_file = None
    if checkpoint is not None:
        settings = settings_of(
            model, train, validation, optimizer, objective, steps=steps, batch_size=batch_size, warmup=warmup,
            schedule=schedule, clip=clip, validate_every=validate_every, keep=keep, seed=seed,
        )  # fmt: skip
        run_file = RunFile(Path(checkpoint), settings)
    with left_as_found(model, optimizer, seed):
        learner = data_parallel(model, objective)
        run = (run_file and run_file.restore(model, optimizer)) or RunState()
        with ProgressBar(steps, run.step, description, progress) as bar:
            for step, batch in batches(train, range(run.step, steps), batch_size, seed):
                began = time.perf_counter()
                set_rates(optimizer, peaks, learning_rate_factor(step, steps, warmup, schedule))
                model.train()
                score, norm = training_step(model, batch, learner, optimizer, list(trainable.values()), clip, step)
                run.record(score, norm, optimizer.param_groups[0]["lr"], time.perf_counter() - began)
                bar.show(run.history)
                if validation is not None and is_due(validate_every, run.step, steps):
                    run.record_validation(evaluate(model, validation, objective), trainable, keep)
                if run_file is not None and is_due(every or max(1, steps // 20), run.step, steps):
                    run_file.save(run, model, optimizer)
    return run.finish(trainable)


def training_step(
    model: nn.Module, batch: Dataset, objective: Objective, optimizer: torch.optim.Optimizer,
    trainable: list[nn.Parameter], clip: float | None, step: int,
) -> tuple[Score, float]:  # fmt: skip
    """One forward pass, one backward pass, one step. Returns the score and the gradient norm before clipping.

    Raises:
        ValueError: no trainable tensor has a part in the loss.
        FloatingPointError: the loss or the gradient is not finite; no weight has changed then.
    """
    optimizer.zero_grad(set_to_none=True)
    score = objective(model, batch)
    check_finite("loss", score.loss.item(), step)
    check_reached(score.loss)
    try:
        score.loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable, math.inf if clip is None else clip).item()
        check_finite("gradient norm", norm, step)
        optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)  # no gradient outlives its step
    return score, norm

"""Training and evaluation: one loop for pretraining, full fine-tuning and every PEFT method.

The loop does not know what it trains: it hands the optimizer the tensors with `requires_grad`, and refuses a model that
has none, or an optimizer that holds others. What is asked of the model is in `objectives.py`, how several processes
share the work in `distributed.py`.

Sources: AdamW, Loshchilov & Hutter 2019, algorithm 2; warm-up, Vaswani et al. 2017, section 5.3; cosine decay,
Loshchilov & Hutter 2017, equation 5 without restarts; clipping by the global norm, Pascanu et al. 2013, algorithm 1.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from minitransformer.fast.memory import keep_freed_memory
from minitransformer.files import fingerprint
from minitransformer.modes import evaluation_mode, modes_restored
from minitransformer.tasks.dataset import Dataset, by_length
from minitransformer.training.distributed import data_parallel, is_writer, n_processes, rank, total
from minitransformer.training.objectives import (
    Objective,
    Score,
    answer_logits,
    answer_loss,
    label_loss,
    next_token_loss,
)
from minitransformer.training.resume import RunFile, RunState

__all__ = [
    "History", "Objective", "Score", "answer_logits", "answer_loss", "check_optimizer", "evaluate", "fit", "label_loss",
    "learning_rate_factor", "next_token_loss", "predict", "training_step",
]  # fmt: skip

SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class History:
    """What a run recorded, step by step, for plots."""

    loss: list[float] = field(default_factory=list)  # training loss of each step
    accuracy: list[float] = field(default_factory=list)  # training accuracy of each step
    learning_rate: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)  # before clipping
    validation_step: list[int] = field(default_factory=list)  # steps done when it was taken
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of the training steps, without validation
    kept_step: int = 0  # the weights at the end are those after this many steps

    @property
    def seconds_per_step(self) -> float:
        """Mean wall-clock time of a training step."""
        return self.seconds / max(1, len(self.loss))


def fit(
    model: nn.Module,
    train: Dataset | Callable[[int], Dataset],
    validation: Dataset | None = None,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    objective: Objective = answer_loss,
    warmup: int | None = None,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float | None = 1.0,
    validate_every: int | None = None,
    keep: str = "last",
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    progress: bool = True,
    description: str = "fit",
    checkpoint: str | Path | None = None,
    every: int | None = None,
) -> History:
    """Train the tensors of `model` that require a gradient, in place.

    Args:
        model: whatever the objective can call; its trainable tensors are those with `requires_grad`.
        train: a dataset, walked in a fresh random order each epoch, or a function from the step to a batch.
        validation: scored every `validate_every` steps and at the end.
        steps: optimizer steps.
        learning_rate: peak of the schedule. With an `optimizer` of your own its groups' rates are the peaks.
        batch_size: rows a step, where `train` is a dataset.
        objective: from model and batch to a `Score`.
        warmup: steps of linear warm-up; by default a twentieth of all, at most 100.
        schedule: what follows it: "cosine" or "linear" decay to 0, or "constant".
        weight_decay, betas: of AdamW.
        clip: largest global gradient norm; None never clips.
        validate_every: steps between validations; None validates once, at the end.
        keep: "last" weights, or the "best" ones by validation accuracy (by loss where that ties).
        optimizer: instead of AdamW. It must hold every trainable tensor.
        seed: of the data order and of dropout. The caller's random state is left alone. (Of several processes each has
            a dropout of its own, which a resumed run draws anew.)
        progress: show a bar with loss and accuracy.
        description: its caption.
        checkpoint: a file that holds the state of the run. If it is there, the run goes on from it, and ends in the
            same bits as one that was never interrupted; give the same model, data and settings. It stays when the run
            is over: the same call again then returns at once.
        every: steps between two writes of that file; by default a twentieth of all.

    Returns:
        The history of the run.

    Raises:
        ValueError: nothing to train, a trainable tensor that the optimizer does not hold, a bad option, or a
            checkpoint that is damaged or belongs to another run.
        FloatingPointError: a loss or a gradient is NaN or infinite; the weights are those before that step.
    """
    _check_options(steps, batch_size, warmup, clip, schedule, keep, validation, validate_every, checkpoint, every)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if optimizer is None:
        _check_trainable(trainable)
        optimizer = torch.optim.AdamW(trainable.values(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    check_optimizer(model, optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    keep_freed_memory()
    warmup = min(100, steps // 20) if warmup is None else warmup
    run_file = None
    if checkpoint is not None:
        settings = {
            "steps": steps, "batch_size": batch_size, "warmup": warmup, "schedule": schedule, "clip": clip,
            "validate_every": validate_every, "keep": keep, "seed": seed,
            "objective": getattr(objective, "__qualname__", repr(objective)),
            **_identities(model, train, validation, optimizer),
        }  # fmt: skip
        run_file = RunFile(Path(checkpoint), every or max(1, steps // 20), settings)
    with _left_as_found(model, optimizer), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + rank())  # dropout falls elsewhere in each process
        learner = data_parallel(model, objective)
        state = (run_file and run_file.restore(model, optimizer)) or RunState(0, asdict(History()))
        history, best = History(**state.history), state.best
        batches = _batches(train, range(state.step, steps), batch_size, seed)
        with _bar(steps, state.step, description, progress) as bar:
            for step, batch in enumerate(batches, start=state.step):
                factor = learning_rate_factor(step, steps, warmup, schedule)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor
                began = time.perf_counter()
                model.train()
                score, norm = training_step(model, batch, learner, optimizer, list(trainable.values()), clip, step)
                history.seconds += time.perf_counter() - began
                _record(history, score, norm, optimizer)
                _show(bar, history)
                done = step + 1
                if validation is not None and (done == steps or (validate_every and done % validate_every == 0)):
                    merit = _validate(model, validation, objective, history, done)
                    if keep == "best" and (best is None or merit > best[0]):
                        best = (merit, done, {name: p.detach().clone() for name, p in trainable.items()})
                if run_file is not None and run_file.is_due(done, steps) and is_writer():
                    run_file.save(RunState(done, asdict(history), best), model, optimizer)
    history.kept_step = steps
    if best is not None:
        history.kept_step = best[1]
        with torch.no_grad():
            for name, p in trainable.items():
                p.copy_(best[2][name])
    return history


def _bar(steps: int, done: int, description: str, progress: bool) -> tqdm:
    options = {"file": sys.stdout, "ncols": 100, "mininterval": 0.5}
    return tqdm(total=steps, initial=done, desc=description, disable=not (progress and is_writer()), **options)


def _validate(model, validation: Dataset, objective: Objective, history: History, done: int) -> tuple[float, float]:
    """Score the validation set after `done` steps, record it, and say how good that is: more is better."""
    result = evaluate(model, validation, objective)
    history.validation_step.append(done)
    history.validation_loss.append(result["loss"])
    history.validation_accuracy.append(result["accuracy"])
    return result["accuracy"], -result["loss"]


def _identities(model: nn.Module, train, validation: Dataset | None, optimizer: torch.optim.Optimizer) -> dict:
    """Short marks of what a run works on, by which it is known again."""

    def mark(dataset) -> str:
        if not isinstance(dataset, Dataset):
            return getattr(dataset, "__qualname__", type(dataset).__name__)
        return fingerprint({"tokens": dataset.tokens, "real": dataset.padding_mask, "targets": dataset.targets})

    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    options = {key for group in optimizer.param_groups for key in group} - {"params"}
    return {
        "frozen base": fingerprint(frozen),
        "list of trained tensors": {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad},
        "training data": mark(train),
        "validation data": mark(validation),
        "optimizer": type(optimizer).__name__,
        **{key: [repr(group.get(key)) for group in optimizer.param_groups] for key in sorted(options)},
    }


@contextmanager
def _left_as_found(model: nn.Module, optimizer: torch.optim.Optimizer):
    """Afterwards the modules' modes and the optimizer's rates are as they were, also after an exception."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    try:
        with modes_restored(model):
            yield
    finally:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak


def training_step(
    model: nn.Module,
    batch: Dataset,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    trainable: list[nn.Parameter],
    clip: float | None,
    step: int,
) -> tuple[Score, float]:
    """One forward pass, one backward pass, one step. Returns the score and the gradient norm before clipping.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; no weight has changed then.
    """
    score = objective(model, batch)
    loss = score.loss.item()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {step}; the weights are still those before it. Lower the learning rate, "
            f"warm up for longer, or look for bad values in the data"
        )
    optimizer.zero_grad(set_to_none=True)
    if not score.loss.requires_grad:
        raise ValueError(
            "no trainable tensor has a part in the loss, so nothing can be learned: is the method disabled, or merged "
            "into the weights? unmerge(model) first"
        )
    score.loss.backward()
    norm = nn.utils.clip_grad_norm_(trainable, math.inf if clip is None else clip).item()
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"the gradient norm is {norm} at step {step}; the weights are still those before it. Lower the learning "
            f"rate, or warm up for longer"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return score, norm


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the peak learning rate that `step` (from 0) uses: linear warm-up, then the decay."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)  # from 0 at the peak towards 1
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 if schedule == "constant" else 1.0 - done


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, objective: Objective = answer_loss, batch_size: int = 64
) -> dict[str, float]:
    """Mean loss and accuracy over a dataset, with dropout off; every module's mode is restored.

    Rows of like length share a batch, so that little padding is computed.

    Several processes take turns with the batches, so all of them must call it; each gets the result of all.

    Raises:
        ValueError: there is nothing to score.
    """
    loss = correct = count = 0.0
    order = by_length(dataset)
    with evaluation_mode(model):
        for start in range(rank() * batch_size, len(dataset), n_processes() * batch_size):
            score = objective(model, dataset.rows(order[start : start + batch_size]).trimmed())
            if score.count:  # the mean loss over no answers is NaN
                loss += score.loss.item() * score.count
                correct += score.correct
                count += score.count
    loss, correct, count = total(loss, correct, count)
    if count == 0:
        raise ValueError("the data set asks nothing: it is empty, or no row is long enough to have a next word")
    return {"loss": loss / count, "accuracy": correct / count}


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Dataset, choices: list[int] | None = None, batch_size: int = 64
) -> Int[Tensor, "N"]:
    """The answer word of each row, in the order of the rows: the best of all words, or of `choices` only."""
    answers = torch.empty_like(dataset.targets)
    with evaluation_mode(model):
        for rows in by_length(dataset).split(batch_size):
            logits = answer_logits(model, dataset.rows(rows).trimmed())
            if choices is None:
                answers[rows] = logits.argmax(dim=-1)
            else:
                answers[rows] = torch.tensor(choices, device=logits.device)[logits[:, choices].argmax(dim=-1)]
    return answers


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the model has trainable tensors and the optimizer holds every one of them."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check_trainable(trainable)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in trainable.items() if id(p) not in held]
    if left_out:
        raise ValueError(
            f"the optimizer does not hold {len(left_out)} trainable tensors ({', '.join(left_out[:3])}"
            f"{', …' if len(left_out) > 3 else ''}), so they would never move; make the optimizer after the last "
            f"attach()"
        )


def _check_trainable(trainable: dict[str, nn.Parameter]) -> None:
    if not trainable:
        raise ValueError(
            "the model has nothing to train: no tensor requires a gradient. Attach a method first, or call "
            "model.requires_grad_(True) to fine-tune everything"
        )


def _check_options(
    steps, batch_size, warmup, clip, schedule, keep, validation, validate_every, checkpoint, every
) -> None:
    if every is not None and (checkpoint is None or every < 1):
        raise ValueError(f"every={every} goes with a checkpoint file, and must be at least 1")
    if warmup is not None and not 0 <= warmup < max(1, steps):
        raise ValueError(f"warmup={warmup} must be at least 0 and shorter than the run of {steps} steps")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip={clip} must be above 0; None never clips")
    if steps < 1 or batch_size < 1 or (validate_every is not None and validate_every < 1):
        raise ValueError(f"steps={steps}, batch_size={batch_size}, validate_every={validate_every} must be at least 1")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if keep not in ("last", "best"):
        raise ValueError(f'keep={keep!r} is unknown; choose "last" or "best"')
    if keep == "best" and validation is None:
        raise ValueError('keep="best" needs a validation set to judge by')
    if validation is not None and len(validation) == 0:
        raise ValueError("the validation set is empty; leave it out, or give it rows")


def _batches(train: Dataset | Callable[[int], Dataset], steps: range, batch_size: int, seed: int) -> Iterator[Dataset]:
    """The batches of those steps. Of a data set, each epoch walks the rows in an order that (seed, epoch) decide."""
    if callable(train):
        yield from (train(step) for step in steps)
        return
    if len(train) == 0:
        raise ValueError("the training set is empty")
    per_epoch = max(1, len(train) // batch_size)
    ordered = None  # the epoch whose order is at hand
    for step in steps:
        epoch, position = divmod(step, per_epoch)
        if epoch != ordered:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order, ordered = torch.randperm(len(train), generator=generator), epoch
        yield train.rows(order[position * batch_size : (position + 1) * batch_size]).trimmed()


def _record(history: History, score: Score, norm: float, optimizer: torch.optim.Optimizer) -> None:
    history.loss.append(score.loss.item())
    history.accuracy.append(score.correct / score.count)
    history.gradient_norm.append(norm)
    history.learning_rate.append(optimizer.param_groups[0]["lr"])


def _show(bar: tqdm, history: History) -> None:
    recent = slice(-20, None)
    n = len(history.loss[recent])
    loss, accuracy = sum(history.loss[recent]) / n, sum(history.accuracy[recent]) / n
    bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
    bar.update()

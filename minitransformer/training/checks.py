"""What training refuses, with messages that name the cure."""

import math
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import nn

from minitransformer.config import check_whole
from minitransformer.tasks.dataset import Dataset
from minitransformer.training.objectives import Score


def check_options(given: Mapping) -> None:
    """Raise ValueError unless `fit` can run with these arguments, and none of them would be ignored."""
    o = SimpleNamespace(**given)
    least = {"steps": 1, "accumulate": 1, "seed": 0, "batch_size": 1, "warmup": 0, "validate_every": 1, "every": 1}
    for name, lowest in least.items():
        if given[name] is not None or name in ("steps", "accumulate", "seed"):
            check_whole(name, given[name], lowest)
    for name, serves in (("train", callable(o.train)), ("validation", o.validation is None)):
        if not serves and not (isinstance(given[name], Dataset) and len(given[name])):
            raise ValueError(f"{name} is empty, or a {type(given[name]).__name__}; give a Dataset with rows")
    if o.batch_size is not None and not callable(o.train) and o.batch_size > len(o.train):
        raise ValueError(f"batch_size={o.batch_size} is more than the {len(o.train)} rows of train")
    if not callable(o.schedule) and o.schedule not in ("cosine", "linear", "constant"):
        raise ValueError(f"schedule={o.schedule!r} is unknown; choose one of cosine, linear, constant, or a function")
    if o.warmup is not None and o.warmup >= o.steps:
        raise ValueError(f"warmup={o.warmup} must be shorter than the run of {o.steps} steps")
    if o.autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast={o.autocast!r}: only torch.bfloat16; torch.float16 would need its losses scaled")
    if o.autocast and any(p.dtype == torch.float64 for p in o.model.parameters()):
        raise ValueError("autocast would be ignored: it leaves float64 as it is; model.float() first, or leave it out")
    if o.clip is not None and not o.clip > 0:
        raise ValueError(f"clip={o.clip} must be above 0; None never clips")
    adamw = (o.optimizer is None, "AdamW; an optimizer of your own says it in its groups")
    serving = {
        "learning_rate": adamw, "weight_decay": adamw, "betas": adamw,
        "warmup": (not callable(o.schedule), "a named schedule; a function says it all"),
        "batch_size": (not callable(o.train), "a data set; a function makes its own batches"),
        "validate_every": (o.validation is not None, "a validation set"),
        "every": (o.checkpoint is not None, "a checkpoint file"),
    }  # fmt: skip
    for name, (serves, place) in serving.items():
        if given[name] is not None and not serves:
            raise ValueError(f"{name}={given[name]!r} would be ignored, since it goes with {place}; leave it out")


def trainable_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors by name; raise ValueError where there are none, or some that training could not change."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "the model has nothing to train: no tensor requires a gradient. Attach a method first, or call "
            "model.requires_grad_(True) to fine-tune everything"
        )
    for name, module in model.named_modules():
        says = dir(type(module))  # the class: an attribute of a module may be the reader's own
        out = ("merged" in says and module.merged is True) or ("enabled" in says and module.enabled is False)
        if out and any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"{name} is merged into the weights, or off: unmerge(model) first, or leave disabled(…)")
    for name, p in trainable.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {p.dtype}, where small steps are lost and large ones overflow; model.float() trains it in "
                f"32 bits, or attach a method, whose tensors are float32 on a frozen base of 16 bits"
            )
    return trainable


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the model has trainable tensors and the optimizer holds every one of them."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in trainable_of(model).items() if id(p) not in held]
    if left_out:
        names = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")
        raise ValueError(
            f"the optimizer does not hold {len(left_out)} trainable tensors ({names}), so they would never move; make "
            f"the optimizer after the last attach()"
        )


def check_finite(name: str, value: float, step: int) -> None:
    """Raise FloatingPointError if the loss, the gradient norm or the weights of a step are NaN or infinite."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {name} is {value} at step {step}; the weights are still those before it. Lower the learning rate, "
            f"warm up for longer, or look for bad values in the data"
        )


def check_score(score: Score, step: int) -> None:
    """Raise unless the score is one, is finite, and can be learned from."""
    if not isinstance(score, Score) or score.loss.dim():
        raise ValueError(f"the objective gave {type(score).__name__}; give a Score(loss, correct, count), loss scalar")
    check_finite("loss", score.loss.item(), step)
    if not score.loss.requires_grad:
        raise ValueError("no trainable tensor has a part in the loss; does the objective detach it?")


def check_asked(count: int, step: int) -> None:
    """Raise ValueError if a batch asked for no answer."""
    if count == 0:
        raise ValueError(f"the batch of step {step} asks nothing: every label is -100, or no row has a next word")

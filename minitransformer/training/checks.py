"""What training refuses, with messages that name the cure."""

import math

import torch
from torch import Tensor, nn

from minitransformer.training.plan import SCHEDULES


def check_options(
    steps, batch_size, warmup, clip, schedule, keep, validation, validate_every, checkpoint, every
) -> None:
    """Raise ValueError unless `fit` can run with these options."""
    if every is not None and (checkpoint is None or every < 1):
        raise ValueError(f"every={every} goes with a checkpoint file, and must be at least 1")
    if warmup is not None and not 0 <= warmup < max(1, steps):
        raise ValueError(f"warmup={warmup} must be at least 0 and shorter than the run of {steps} steps")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip={clip} must be above 0; None never clips")
    if steps < 1 or batch_size < 1 or (validate_every is not None and validate_every < 1):
        raise ValueError(f"steps={steps}, batch_size={batch_size}, validate_every={validate_every} must be at least 1")
    if not callable(schedule) and schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}, or give a function")
    if keep not in ("last", "best"):
        raise ValueError(f'keep={keep!r} is unknown; choose "last" or "best"')
    if keep == "best" and validation is None:
        raise ValueError('keep="best" needs a validation set to judge by')
    if validation is not None and len(validation) == 0:
        raise ValueError("the validation set is empty; leave it out, or give it rows")


def trainable_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors by name; raise ValueError where there are none."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "the model has nothing to train: no tensor requires a gradient. Attach a method first, or call "
            "model.requires_grad_(True) to fine-tune everything"
        )
    return trainable


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the model has trainable tensors and the optimizer holds every one of them."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in trainable_of(model).items() if id(p) not in held]
    if left_out:
        raise ValueError(
            f"the optimizer does not hold {len(left_out)} trainable tensors ({', '.join(left_out[:3])}"
            f"{', …' if len(left_out) > 3 else ''}), so they would never move; make the optimizer after the last "
            f"attach()"
        )


def check_finite(name: str, value: float, step: int) -> None:
    """Raise FloatingPointError if the loss or the gradient norm of a step is NaN or infinite."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {name} is {value} at step {step}; the weights are still those before it. Lower the learning rate, "
            f"warm up for longer, or look for bad values in the data"
        )


def check_reached(loss: Tensor) -> None:
    """Raise ValueError if no gradient can flow from the loss to a trainable tensor."""
    if not loss.requires_grad:
        raise ValueError(
            "no trainable tensor has a part in the loss, so nothing can be learned: is the method disabled, or merged "
            "into the weights? unmerge(model) first"
        )

"""How far a run is: what it recorded, its best weights, and the bar that shows it."""

import math
import sys
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minitransformer.training.distributed import is_writer
from minitransformer.training.objectives import Score


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

    @property
    def best_validation(self) -> int:
        """The number of the first validation with the highest accuracy, and of these with the lowest loss."""
        losses = [loss if math.isfinite(loss) else math.inf for loss in self.validation_loss]
        merits = [(accuracy, -loss) for accuracy, loss in zip(self.validation_accuracy, losses, strict=True)]
        return merits.index(max(merits))


@dataclass
class RunState:
    """Where a run stands."""

    history: History = field(default_factory=History)
    best: dict[str, Tensor] = field(default_factory=dict)  # the best trained weights so far, where they are kept

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history.loss)

    def record(self, score: Score, gradient_norm: float, learning_rate: float, seconds: float) -> None:
        """Note what one step gave."""
        self.history.loss.append(score.loss.item())
        self.history.accuracy.append(score.correct / score.count)
        self.history.gradient_norm.append(gradient_norm)
        self.history.learning_rate.append(learning_rate)
        self.history.seconds += seconds

    def record_validation(self, result: dict[str, float], trainable: dict[str, nn.Parameter], keep: str) -> None:
        """Note the scores of a validation, and the weights if they are the best and these are to be kept."""
        self.history.validation_step.append(self.step)
        self.history.validation_loss.append(result["loss"])
        self.history.validation_accuracy.append(result["accuracy"])
        if keep == "best" and self.history.best_validation == len(self.history.validation_step) - 1:
            self.best = {name: p.detach().clone() for name, p in trainable.items()}

    @torch.no_grad()
    def finish(self, trainable: dict[str, nn.Parameter]) -> History:
        """Put the best weights back, if they were kept; the history then says which ones the model has."""
        self.history.kept_step = self.step
        if self.best:
            self.history.kept_step = self.history.validation_step[self.history.best_validation]
            for name, p in trainable.items():
                p.copy_(self.best[name])
        return self.history


class ProgressBar(tqdm):
    """A bar with the means of loss and accuracy over the last 20 steps; only the process that writes files shows it."""

    def __init__(self, steps: int, done: int, description: str, shown: bool):
        options = {"file": sys.stdout, "ncols": 100, "mininterval": 0.5, "disable": not (shown and is_writer())}
        super().__init__(total=steps, initial=done, desc=description, **options)

    def show(self, history: History) -> None:
        """One step more."""
        loss, accuracy = fmean(history.loss[-20:]), fmean(history.accuracy[-20:])
        self.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        self.update()

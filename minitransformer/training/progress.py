"""What a run records, and the bar that shows it."""

import sys
from dataclasses import dataclass, field
from statistics import fmean

from tqdm import tqdm

from minitransformer.training.distributed import is_writer


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

    @property
    def seconds_per_step(self) -> float:
        """Mean wall-clock time of a training step."""
        return self.seconds / max(1, len(self.loss))

    def note(self, **values: float | int) -> None:
        """Add a value to each of these lists."""
        for name, value in values.items():
            getattr(self, name).append(value)


class ProgressBar(tqdm):
    """A bar with the means of loss and accuracy over the last 20 steps; only the process that writes files shows it."""

    def __init__(self, steps: int, done: int, description: str, shown: bool):
        own = {"file": sys.stdout, "ncols": 100, "mininterval": 0.5, "disable": not (shown and is_writer())}
        super().__init__(total=steps, initial=done, desc=description, **own)

    def show(self, history: History) -> None:
        """One step more."""
        loss, accuracy = fmean(history.loss[-20:]), fmean(history.accuracy[-20:])
        self.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        self.update()

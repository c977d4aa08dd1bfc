"""What a run records."""

from dataclasses import dataclass, field


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

"""Training and evaluation: one loop for pretraining, full fine-tuning and every PEFT method."""

from minitransformer.training.loop import (
    History,
    check_optimizer,
    evaluate,
    fit,
    learning_rate_factor,
    predict,
    training_step,
)
from minitransformer.training.objectives import (
    Objective,
    Score,
    answer_logits,
    answer_loss,
    label_loss,
    next_token_loss,
)

__all__ = [
    "History",
    "Objective",
    "Score",
    "answer_logits",
    "answer_loss",
    "check_optimizer",
    "evaluate",
    "fit",
    "label_loss",
    "learning_rate_factor",
    "next_token_loss",
    "predict",
    "training_step",
]

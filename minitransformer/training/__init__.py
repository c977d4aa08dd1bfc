"""Training and evaluation: one loop for pretraining, full fine-tuning and every PEFT method.

Read loop, objectives, evaluation, plan; then what surrounds a run: history, checks, resume, identity, distributed.
"""

from minitransformer.training.checks import check_optimizer
from minitransformer.training.evaluation import evaluate, predict
from minitransformer.training.history import History
from minitransformer.training.loop import fit, training_step
from minitransformer.training.objectives import (
    Objective,
    Score,
    answer_logits,
    answer_loss,
    answer_only,
    label_loss,
    next_token_loss,
)
from minitransformer.training.plan import learning_rate_factor

__all__ = [
    "History", "Objective", "Score", "answer_logits", "answer_loss", "answer_only", "check_optimizer", "evaluate",
    "fit", "label_loss", "learning_rate_factor", "next_token_loss", "predict", "training_step",
]  # fmt: skip

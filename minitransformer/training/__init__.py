"""Training and evaluation: one loop for pretraining, full fine-tuning and every PEFT method.

Read in this order: loop, objectives, evaluation, plan. The others are what surrounds a run: progress, checks, resume,
identity, distributed. `pretrain` is a program: it trains the toy backbone.
"""

from minitransformer.training.checks import check_optimizer
from minitransformer.training.evaluation import evaluate, predict
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
from minitransformer.training.progress import History

__all__ = [
    "History", "Objective", "Score", "answer_logits", "answer_loss", "answer_only", "check_optimizer", "evaluate",
    "fit", "label_loss", "learning_rate_factor", "next_token_loss", "predict", "training_step",
]  # fmt: skip

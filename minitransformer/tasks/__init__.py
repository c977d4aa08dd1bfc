"""The toy world: a tiny language, pretraining text in it, and two tasks with one answer word each."""

from minitransformer.tasks.dataset import Dataset, Split, Task, pad_rows
from minitransformer.tasks.toy.bag_of_words import bag_of_words_accuracy
from minitransformer.tasks.toy.classification import sentiment_splits
from minitransformer.tasks.toy.pretraining import pretraining_rows
from minitransformer.tasks.toy.probes import probe_scores
from minitransformer.tasks.toy.prompts import encode_question, encode_review
from minitransformer.tasks.toy.qa import qa_splits
from minitransformer.tasks.toy.world import world_vocabulary

__all__ = [
    "Dataset",
    "Split",
    "Task",
    "bag_of_words_accuracy",
    "encode_question",
    "encode_review",
    "pad_rows",
    "pretraining_rows",
    "probe_scores",
    "qa_splits",
    "sentiment_splits",
    "world_vocabulary",
]

"""The toy world: a tiny language, pretraining text in it, and two tasks with one answer word each."""

"""What the tests of the sweep and of its commands share."""

from dataclasses import replace

import pytest

from minitransformer.tasks.dataset import Split
from peft.experiments.tasks import TASKS


def first_rows(split: Split, n: int) -> Split:
    return Split(split.tokens[:n], split.padding_mask[:n], split.targets[:n], split.kinds[:n], split.vocabulary)


@pytest.fixture(scope="session")
def task(splits):
    """Sentiment with sixteen rows in each split."""
    whole = splits("sentiment")
    return replace(whole, **{name: first_rows(getattr(whole, name), 16) for name in ("train", "validation", "test")})


@pytest.fixture
def short(task, monkeypatch):
    """The comparison on sentiment with those rows, and with entries of two steps."""
    own = TASKS["sentiment"]
    entries = {name: replace(entry, steps=2) for name, entry in own.entries.items()}
    monkeypatch.setitem(TASKS, "sentiment", replace(own, splits=lambda: task, entries=entries))

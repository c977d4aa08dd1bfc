"""What a forward pass needs to know beside its arguments: which methods are off, which row is under which task.

It belongs to the pass and its thread: another thread does not see it, and a block that is computed again for its
gradient (`checkpointing.py`) sees what it saw the first time, wherever and whenever that happens. A checkpoint of the
reader's own (`torch.utils.checkpoint`) cannot know: what it runs has to enter the context inside, and so does again.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

RECORDS = "records"  # the entry of those who note attention weights


class _Call(threading.local):  # not contextvars: torch.compile cannot trace them
    def __init__(self):  # runs in every thread
        self.told: Mapping = {}


CALL = _Call()


@contextmanager
def telling(told: Mapping) -> Iterator[None]:
    """Inside, `CALL.told` holds these entries as well, in this thread. Nests; ends with an exception too."""
    before = {key: value for key, value in CALL.told.items() if key in told}
    CALL.told = {**CALL.told, **told}
    try:
        yield
    finally:  # only its own entries: another one that began inside may last longer
        CALL.told = {key: value for key, value in CALL.told.items() if key not in told} | before


def of_rows(told: Mapping, rows: Tensor) -> Mapping:
    """The same for a batch of these rows alone: a tensor in the entries says something for each row."""

    def part(entry: object) -> object:
        if isinstance(entry, tuple):
            return tuple(map(part, entry))
        return entry[rows] if isinstance(entry, Tensor) else entry

    return {key: part(entry) for key, entry in told.items()}


def as_told(told: Mapping, step: Callable, *inputs):
    """`step(*inputs)`, which sees these entries, no more and no less, in whatever thread and wherever it runs."""
    before, CALL.told = CALL.told, told
    try:
        return step(*inputs)
    finally:
        CALL.told = before

"""What a forward pass needs to know beside its arguments: which methods are off, which row is under which task.

It belongs to the pass and its thread: another thread does not see it, and a block that is computed again for its
gradient (`checkpointed`) sees what it saw the first time, wherever and whenever that happens. A checkpoint of the
reader's own (`torch.utils.checkpoint`) cannot know: what it runs has to enter the context inside, and so does again.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

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


def checkpointed(step: Callable, *inputs):
    """`step(*inputs)`, of which nothing is kept for the backward pass: it is computed again there.

    The non-reentrant form: the other gives no gradient where no input needs one, as in the first block of every frozen
    model.
    """
    if not torch.compiler.is_compiling():  # a compiled recomputation repeats what was traced
        step = partial(_as_told, CALL.told, step)
    return checkpoint(step, *inputs, use_reentrant=False)


def _as_told(told: Mapping, step: Callable, *inputs):
    before, CALL.told = CALL.told, told  # no more and no less, wherever the backward pass runs
    try:
        return step(*inputs)
    finally:
        CALL.told = before

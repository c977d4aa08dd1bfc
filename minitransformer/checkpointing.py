"""Gradient checkpointing: of each block only its input is kept; for the backward pass the block is computed again.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minitransformer.call import CALL, as_told

EVERY = 4  # blocks: giving memory back before each of them would cost half as much time again
LARGE = 2**20  # bytes of a block's input from which on it pays


def checkpoints(steps: Sequence[Callable]) -> list[Callable]:
    """The same steps, of which each keeps its inputs alone."""
    last = len(steps) - 1
    return [
        partial(checkpointed, partial(_tidied, step) if (last - i) % EVERY == 0 else step)
        for i, step in enumerate(steps)
    ]


def checkpointed(step: Callable, *inputs):
    """`step(*inputs)`, of which nothing is kept for the backward pass: it is computed again there.

    The non-reentrant form: the other gives no gradient where no input needs one, as in the first block of every frozen
    model.
    """
    if not torch.compiler.is_compiling():  # a compiled recomputation repeats what was traced
        step = partial(as_told, CALL.told, step)
    return checkpoint(step, *inputs, use_reentrant=False)


def _tidied(step: Callable, x: Tensor, *others):
    if x.is_cpu and x.nbytes >= LARGE:
        give_memory_back()
    return step(x, *others)


def give_memory_back() -> None:
    """Let the C library return to the system what was freed, where it can.

    Else glibc keeps the blocks' tensors in pieces between the nodes of the graph, each too small by a few bytes for the
    next one of the same size, since a tensor asks for some bytes more than it takes (posix_memalign).
    """
    if not torch.compiler.is_compiling() and (trim := _malloc_trim()):
        trim(0)


@cache
def _malloc_trim() -> Callable | None:
    """glibc's function; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

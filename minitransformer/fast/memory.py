"""Memory that one training step gives back, kept for the next.

A step frees all its activations, and the next one asks for as much again. The GNU C library returns large free pieces
to the system in between, which clears every page before it gives it out anew: on a small model that can be a tenth of
a step. PyTorch's performance tuning guide advises another allocator for the same reason; here the one that is there is
told to keep what it has.
"""

import ctypes
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the options of mallopt(3)
KEPT = 2**30  # bytes of free memory that stay with the process
LARGEST = 2**25  # bytes of a piece that may come out of them: mallopt's limit


@cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB that it has freed, from now on; returns whether the C library knows how.

    Only GNU's does. The most memory that the process ever holds stays the same, within what gaps between pieces waste.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have no such function, Windows no such library
        return False
    return all([mallopt(TRIM_THRESHOLD, KEPT), mallopt(MMAP_THRESHOLD, LARGEST)])

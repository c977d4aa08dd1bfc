"""Freed memory stays with the process: asking for it again costs no page of the system."""

import ctypes
import subprocess
import sys

import pytest

from minitransformer.fast.memory import keep_freed_memory

ROUNDS = """
import ctypes, resource, sys, torch
from minitransformer.fast.memory import keep_freed_memory
torch.set_num_threads(1)
# The library's own first choice, which it changes as it goes: each of the pieces is given back when it is freed.
ctypes.CDLL(None).mallopt(-3, 2**17)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = []
for _ in range(4):
    pieces = [torch.ones(2**20) for _ in range(24)]
    del pieces
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-2])
"""


def knows_how():
    try:
        return hasattr(ctypes.CDLL(None), "mallopt")
    except TypeError:
        return False


def test_it_says_whether_it_could():
    assert keep_freed_memory() is knows_how()


@pytest.mark.skipif(not knows_how(), reason="only the GNU C library can be told to keep freed memory")
def test_memory_that_is_asked_for_again_is_there():
    def faults(mode):
        done = subprocess.run([sys.executable, "-c", ROUNDS, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, given_back = faults("kept"), faults("given back")
    assert kept < 1000 < given_back  # 24 pieces of 4 MiB are 24,576 pages

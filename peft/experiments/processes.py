"""Programs that `torchrun` starts many times: `torchrun --nproc-per-node 2 -m peft compare --task sentiment`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def launched_together() -> Iterator[None]:
    """Inside, the processes that `torchrun` started are connected; one that was started alone stays alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group()  # gloo for tensors of the CPU, and nccl for those of CUDA devices
    try:
        yield
    finally:
        dist.destroy_process_group()

"""Put back: afterwards modes (training or evaluation) are as they were, and after an exception tensors too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_LOCK = threading.RLock()  # a generator that nobody needs any more may be closed at any time
_VISITS: WeakKeyDictionary[nn.Module, list[dict]] = WeakKeyDictionary()  # who is inside, the newest last


@contextmanager
def modes_restored(model: nn.Module):
    """Afterwards every module is in the mode (training or evaluation) it was in, also after an exception.

    Several threads may be inside at once, with the whole model or with parts of it: who leaves before one that came
    later leaves the module's first mode to that one, and the last to leave restores it.
    """
    with _LOCK:
        visit = {module: module.training for module in model.modules()}
        for module in visit:
            _VISITS.setdefault(module, []).append(visit)
    try:
        yield model
    finally:
        with _LOCK:
            for module, mode in visit.items():
                visits = _VISITS[module]
                place = next(i for i, other in enumerate(visits) if other is visit)
                del visits[place]
                if place < len(visits):
                    visits[place][module] = mode
                else:
                    module.training = mode


@contextmanager
def evaluation_mode(model: nn.Module):
    """Dropout off inside; otherwise as `modes_restored`."""
    with modes_restored(model):
        yield model.eval()


@contextmanager
def undone(tensors: list[Tensor]) -> Iterator[None]:
    """After an exception inside, the tensors hold what they held before."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        raise

"""Put back: afterwards modes (training or evaluation) are as they were, and after an exception tensors too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LOCK = threading.RLock()  # a generator that nobody needs any more may be closed at any time
_VISITS: list[dict[nn.Module, bool]] = []  # the modes that each visitor found, the newest visitor last


@contextmanager
def modes_restored(model: nn.Module):
    """Afterwards every module is in the mode (training or evaluation) it was in, also after an exception.

    Several threads may be inside at once, with the whole model or with parts of it: who leaves before one that came
    later leaves the module's first mode to that one, and the last to leave restores it.
    """
    with _LOCK:
        visit = {module: module.training for module in model.modules()}
        _VISITS.append(visit)
    try:
        yield model
    finally:
        with _LOCK:
            place = [other is visit for other in _VISITS].index(True)
            del _VISITS[place]
            for module, mode in visit.items():
                later = next((other for other in _VISITS[place:] if module in other), None)
                if later is None:
                    module.training = mode
                else:
                    later[module] = mode


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

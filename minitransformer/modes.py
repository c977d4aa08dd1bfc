"""Training or evaluation mode for a while: afterwards every module is in the mode that it was in."""

from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(model: nn.Module):
    """Afterwards every module is in the mode (training or evaluation) it was in, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluation_mode(model: nn.Module):
    """Dropout off inside; afterwards every module is in the mode it was in, also after an exception."""
    with modes_restored(model):
        yield model.eval()

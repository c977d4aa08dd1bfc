"""Random state that is left as it was found, on every device that may draw."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that a device draws from where no other is given; that of the CPU if it has none of its own."""
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        module.init()
        return module.default_generators[module.current_device() if device.index is None else device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


@contextmanager
def random_state_restored(*devices: torch.device) -> Iterator[None]:
    """Afterwards the random states of the CPU and of these devices are as they were, also after an exception.

    `torch.manual_seed` inside would change every other device too: seed `generator_of` the devices instead.
    """
    generators = [torch.default_generator, *map(generator_of, devices)]
    before = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)

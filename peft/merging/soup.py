"""A soup: several runs of one recipe, which differ in their seeds only, averaged into one model.

Source: Wortsman et al. 2022, "Model soups", section 2 (the uniform soup). Runs that start from one pretrained model and
go not too far from it end in one valley of the loss: the mean of their weights lies inside, where it is often lower.

    W0 + 1/K (ΔW_1 + … + ΔW_K)                     one model, where an ensemble would run K of them

Of LoRAs the *updates* are averaged, not the factors, whose product has cross terms (`combine.py`): the sum is a LoRA of
rank K r or of the width of the model, exactly, and merged it costs nothing more than any other weight.

Differs from the paper: its runs differ in their settings as well, and its greedy soup leaves bad runs out.
"""

from collections.abc import Sequence

import torch
from torch import nn

from peft.attach import attach, attached, detach, load_state_dict, state_dict
from peft.contents import base_hash
from peft.merging.combine import combine
from peft.methods.lora import LoRA
from peft.sites import all_wrappers


def soup(models: Sequence[nn.Module], base: nn.Module) -> nn.Module:
    """The mean of several LoRAs, and of the modules that were trained whole beside them, attached to `base`.

    Args:
        models: each with one LoRA attached, and the same modules in `train_also`.
        base: the frozen model that all of them started from, nothing attached; it is changed in place, and returned.

    Raises:
        ValueError: no model, nothing attached to one, other modules in `train_also`, another base, or what `combine`
            refuses. The base is as it was then.
    """
    if not models or attached(base):
        raise ValueError("a soup needs at least one model, and a base to which nothing is attached; detach(base) first")
    records, states = [attached(model) for model in models], [state_dict(model) for model in models]
    if any(len(own) != 1 or not isinstance(own[0].method, LoRA) for own in records):
        raise ValueError("a soup is made of models with a single LoRA attached; one of these has something else")
    beside = {own[0].train_also for own in records}
    if len(beside) > 1:
        raise ValueError(f"the models trained different modules beside their LoRA: {sorted(beside)}")
    factors = {f"{site}.{name}" for model in models for site in all_wrappers(model) for name in ("A", "B")}
    loras = [
        (own[0].method, {name: tensor for name, tensor in state.items() if name in factors})
        for own, state in zip(records, states, strict=True)
    ]
    recipe, tensors = combine(loras, [1 / len(models)] * len(models))
    for name in states[0].keys() - factors:
        mean = torch.stack([state[name].cpu() for state in states]).double().mean(dim=0)
        tensors[name] = mean.to(states[0][name].dtype)  # a BatchNorm counts in whole numbers
    attach(base, recipe, train_also=beside.pop())
    try:
        if {base_hash(model) for model in models} != {base_hash(base)}:
            raise ValueError("the models were trained on other base weights; give the base that they started from")
        load_state_dict(base, tensors)
    except ValueError:
        detach(base)
        raise
    return base

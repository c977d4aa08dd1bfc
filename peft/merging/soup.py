"""A soup: several runs of one recipe, which differ in their seeds only, averaged into one model.

Source: Wortsman et al. 2022, "Model soups", section 2 (the uniform soup). Runs that start from one pretrained model and
go not too far from it end in one valley of the loss: the mean of their weights lies inside, where it is often lower.

    W0 + 1/K (ΔW_1 + … + ΔW_K)                     one model, where an ensemble would run K of them

Of LoRAs the *updates* are averaged, not the factors, whose product has cross terms (`combine.py`): the sum is a
LoRA of rank K r, exactly, and merged it costs nothing more than any other weight.

Differs from the paper: its runs differ in their settings as well, and its greedy soup leaves bad runs out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft.attach import attach, attached, load_state_dict, state_dict
from peft.merging.combine import combine
from peft.methods.lora import LoRA


def soup(models: Sequence[nn.Module], base: nn.Module) -> nn.Module:
    """The mean of several LoRAs, and of the modules that were trained whole beside them, attached to `base`.

    Args:
        models: each with one LoRA attached, and the same modules in `train_also`.
        base: the frozen model that all of them started from, nothing attached; it is changed in place, and returned.

    Raises:
        ValueError: no model, nothing attached to one, other modules in `train_also`, or what `combine` refuses.
    """
    if not models:
        raise ValueError("a soup needs at least one model")
    records = [attached(model) for model in models]
    for own in records:
        if len(own) != 1 or not isinstance(own[0].method, LoRA):
            names = ", ".join(type(record.method).__name__ for record in own) or "nothing"
            raise ValueError(f"a soup is made of models with a single LoRA attached; one of these has {names}")
    beside = {tuple(own[0].train_also) for own in records}
    if len(beside) > 1:
        raise ValueError(f"the models trained different modules beside their LoRA: {sorted(beside)}")
    states = [state_dict(model) for model in models]
    loras = [(own[0].method, _factors(state)) for own, state in zip(records, states, strict=True)]
    recipe, tensors = combine(loras, [1 / len(models)] * len(models))
    whole = states[0].keys() - _factors(states[0]).keys()
    tensors |= {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in whole}
    load_state_dict(attach(base, recipe, train_also=beside.pop()), tensors)
    return base


def _factors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.endswith((".A", ".B"))}

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
from torch import Tensor, nn

from peft.attach import attach, attached, detach, load_state_dict, state_dict
from peft.contents import base_hash
from peft.merging.combine import WithTensors, combine_by_rank
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
    loras, beside = zip(*map(_parts_of, models), strict=True)
    if len({tuple((name, t.shape) for name, t in own.items()) for own in beside}) > 1:
        raise ValueError("the models trained different modules beside their LoRA (train_also); choose those that agree")
    tensors, also = {}, attached(models[0])[0].train_also
    for name, first in beside[0].items():  # in float64, and a BatchNorm counts in whole numbers
        tensors[name] = torch.stack([own[name] for own in beside]).double().mean(dim=0).to(first.dtype)
    mean = combine_by_rank(loras, [1 / len(models)] * len(models))
    try:
        for recipe, factors in mean:
            attach(base, recipe, train_also=also)
            tensors, also = tensors | factors, ()
        if {base_hash(model) for model in models} != {base_hash(base)}:
            raise ValueError("the models were trained on other base weights; give the base that they started from")
        load_state_dict(base, tensors)
    except BaseException:
        if attached(base):
            detach(base)
        raise
    return base


def _parts_of(model: nn.Module) -> tuple[WithTensors, dict[str, Tensor]]:
    """The LoRA as its recipe and factors, and the tensors that were trained whole beside it."""
    recipes, state = [record.method for record in attached(model)], state_dict(model)
    if len(recipes) != 1:
        raise ValueError("a soup is made of models with a single LoRA attached; one of these has something else")
    names = {f"{site}.{name}" for site, wrappers in all_wrappers(model).items() for name in wrappers[0].tensors()}
    factors = {name: state.pop(name) for name in names}
    return (recipes[0], factors), state

"""Merging: an update that a weight can hold (LoRA's, DoRA's, VeRA's) is written into it, and costs nothing more.

Source: Hu et al. 2022, section 4.1, "No Additional Inference Latency".

    W = W0 + (alpha / r) B A                         [d_out, d_in]

`unmerge` puts back a copy of W0 that was kept: subtracting the update again would leave rounding errors, which add up
over many rounds.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft.attach import without_wrappers
from peft.methods.linear import MergeableLinear
from peft.sites import all_wrappers, merged_wrappers


def merge(model: nn.Module) -> nn.Module:
    """Write every update that a weight can hold into the weight it belongs to, in place; returns the model.

    Raises:
        ValueError: nothing is attached that a weight can hold, it is merged already, or a tensor holds a NaN or an
            infinity. No weight has changed then.
    """
    loras = _loras(model)
    if any(lora.merged for lora in loras.values()):
        raise ValueError("the updates are merged already; unmerge(model) first")
    weights = {name: _merged_weight(name, lora) for name, lora in loras.items()}
    for name, lora in loras.items():
        lora.write(weights[name])
    return model


@torch.no_grad()
def _merged_weight(name: str, lora: MergeableLinear) -> Float[Tensor, "d_out d_in"]:
    weight = lora.changed_weight().to(lora.base.weight.dtype)
    for tensor in (*lora.tensors().values(), weight):  # a NaN in A is lost where B is 0, but not what it says
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the update of {name} holds a NaN or an infinity, so nothing was merged")
    return weight


def unmerge(model: nn.Module) -> nn.Module:
    """Put every frozen weight back, bit for bit, in place; returns the model.

    Raises:
        ValueError: nothing is merged.
    """
    loras = _loras(model)
    if not any(lora.merged for lora in loras.values()):
        raise ValueError("nothing is merged; merge(model) first")
    for lora in loras.values():
        lora.release()
    return model


def is_merged(model: nn.Module) -> bool:
    """Whether an update is written into a weight at present."""
    return bool(merged_wrappers(model))


def merged_copy(model: nn.Module) -> nn.Module:
    """A copy with the updates in its weights and no wrapper left: the plain model, with its plain names.

    The model itself stays as it is. Modules named in `train_also` come along as they are.

    Raises:
        ValueError: nothing is attached that a weight can hold, or something that none can; or a tensor holds a NaN or
            an infinity.
    """
    _loras(model)
    others = [w for at_site in all_wrappers(model).values() for w in at_site if not isinstance(w, MergeableLinear)]
    if others:
        raise ValueError(
            f"a {type(others[0]).__name__} is attached as well, which is no change of a weight; detach(model), then "
            f"attach or load alone what can be merged"
        )
    twin = copy.deepcopy(model)
    if not is_merged(twin):
        merge(twin)
    return without_wrappers(twin)


def _loras(model: nn.Module) -> dict[str, MergeableLinear]:
    loras = {
        name: wrapper
        for name, wrappers in all_wrappers(model).items()
        for wrapper in wrappers
        if isinstance(wrapper, MergeableLinear)
    }
    if not loras:
        raise ValueError("no LoRA, nor any other update that a weight can hold, is attached: there is nothing to merge")
    return loras

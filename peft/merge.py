"""Merging: LoRA's update written into the weight, so that inference costs what the base costs.

Source: Hu et al. 2022, section 4.1, "No Additional Inference Latency".

    W = W0 + (alpha / r) B A                         [d_out, d_in]

`unmerge` puts back a copy of W0 that was kept: subtracting the update again would leave rounding errors, which add up
over many rounds.
"""

import torch
from torch import nn

from peft.functional import lora_weight
from peft.lora import LoRALinear
from peft.sites import all_wrappers


def merge(model: nn.Module) -> nn.Module:
    """Write every LoRA update into the weight it belongs to, in place; returns the model.

    Raises:
        ValueError: no LoRA is attached, it is merged already, or a factor holds a NaN or an infinity. No weight has
            changed then.
    """
    loras = _loras(model)
    if any(lora.merged for lora in loras.values()):
        raise ValueError("the updates are merged already; unmerge(model) first")
    merged = {}
    for name, lora in loras.items():
        update = lora_weight(lora.A.detach(), lora.B.detach(), lora.recipe.scale)
        if not bool(torch.isfinite(update).all()):
            raise ValueError(f"the update of {name} holds a NaN or an infinity, so nothing was merged")
        weight = lora.base.weight.detach()
        merged[name] = (weight.to(update.dtype) + update).to(weight.dtype)
    for name, lora in loras.items():
        lora.write(merged[name])
    return model


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


def _loras(model: nn.Module) -> dict[str, LoRALinear]:
    loras = {
        name: wrapper
        for name, wrappers in all_wrappers(model).items()
        for wrapper in wrappers
        if isinstance(wrapper, LoRALinear)
    }
    if not loras:
        raise ValueError("no LoRA is attached to this model, and only LoRA can be merged into a weight")
    return loras

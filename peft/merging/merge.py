"""Merging: an update that a weight can hold (LoRA's, DoRA's, VeRA's) becomes one weight, and costs nothing more.

Source: Hu et al. 2022, section 4.1, "No Additional Inference Latency".

    W = W0 + (alpha / r) B A                         [d_out, d_in]

W stands beside W0, which is never written to: `unmerge` forgets W. (Adding the update and subtracting it again would
leave rounding errors, which add up over many rounds.) `merged_copy` makes a plain model that holds W alone.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft.attach import restore_trainability
from peft.methods.linear import MergeableLinear
from peft.sites import all_wrappers, merged_wrappers, sites_of, unwrap


def merge(model: nn.Module) -> nn.Module:
    """Compute the weight that each update amounts to, and use it from now on, in place; returns the model.

    Where something watches or changes a linear layer (a hook, pruning, a parametrisation, autocast), its sum is
    computed as before, so that the outputs stay the same. What is merged must not be trained or changed.

    Raises:
        ValueError: nothing is attached that a weight can hold, a class that says of no weight what it computes, it is
            merged already, a frozen weight of a type of its own, or a tensor holds a NaN or an infinity. Nothing has
            changed then.
    """
    loras = _loras(model)
    if merged_wrappers(model):
        raise ValueError("the updates are merged already; unmerge(model) first")
    weights = {name: _merged_weight(name, lora) for name, lora in loras.items()}
    for name, lora in loras.items():
        lora.merged_weight = weights[name]
    return model


def _merged_weight(name: str, lora: MergeableLinear) -> Float[Tensor, "d_out d_in"]:
    frozen = lora.base.weight
    if type(frozen) not in (Tensor, nn.Parameter):
        raise ValueError(f"the weight of {name} is a {type(frozen).__name__}, not a plain tensor; use it unmerged")
    weight = lora.weight_to_merge()
    for tensor in (*lora.tensors().values(), weight):  # a NaN in A is lost where B is 0, but not what it says
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the update of {name} holds a NaN or an infinity, so nothing was merged")
    return weight


def unmerge(model: nn.Module) -> nn.Module:
    """Forget the merged weights, in place; returns the model.

    Raises:
        ValueError: nothing is merged.
    """
    loras = _loras(model)
    if not merged_wrappers(model):
        raise ValueError("nothing is merged; merge(model) first")
    for lora in loras.values():
        lora.merged_weight = None
    return model


def is_merged(model: nn.Module) -> bool:
    """Whether updates are merged at present."""
    return bool(merged_wrappers(model))


def merged_copy(model: nn.Module) -> nn.Module:
    """A copy with the updates in its weights and no wrapper left: the plain model, with its plain names.

    The model itself stays as it is. Modules named in `train_also` come along as they are.

    Raises:
        ValueError: what `merge` refuses; something else is attached; or a weight that is not the layer's alone: tied,
            pruned, parametrised, or of a layer with hooks, which work on W0 x.
    """
    loras = _loras(model)
    others = [w for at_site in all_wrappers(model).values() for w in at_site if not isinstance(w, MergeableLinear)]
    if others:
        raise ValueError(
            f"a {type(others[0]).__name__} is attached as well, which is no change of a weight; detach(model), then "
            f"attach or load alone what can be merged"
        )
    holders = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    for name, lora in loras.items():
        if not lora.is_replaceable(lora.base.weight) or holders.count(id(lora.base.weight)) > 1:
            raise ValueError(
                f"the weight of {name} cannot be written to: it is tied to another module, pruned or parametrised, a "
                f"hook is on the layer, or autocast is on; merge(model) needs no writing"
            )
    twin = copy.deepcopy(model)
    if not is_merged(twin):
        merge(twin)
    for site in sites_of(twin).values():
        for lora in site.wrappers:
            site.module.weight = nn.Parameter(lora.merged_weight)
        if site.wrappers:
            unwrap(site)
    restore_trainability(twin, twin.trainable_before)
    del twin.attached, twin.trainable_before
    return twin


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

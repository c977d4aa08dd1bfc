"""Merging: an update that a weight can hold (LoRA's, DoRA's, VeRA's) becomes one weight, and costs nothing more.

Source: Hu et al. 2022, section 4.1, "No Additional Inference Latency".

    W = W0 + (alpha / r) B A                         [d_out, d_in]

W stands beside W0, which is never written to, and `unmerge` forgets it: adding the update and subtracting it again
would leave rounding errors, which add up over many rounds.
"""

import copy

import torch
from torch import Tensor, nn

from minitransformer.quantized_layer import Quantized
from peft.attach import restore
from peft.methods.linear import MergeableLinear
from peft.sites import all_wrappers, merged_wrappers


def merge(model: nn.Module) -> nn.Module:
    """Compute the weight that each update amounts to, and use it from now on, in place; returns the model.

    Where something watches or changes a linear layer (a hook, pruning, a parametrisation, autocast), or a tensor is not
    as it was (loaded, copied), the sum is computed as before, so that the outputs are right.

    Raises:
        ValueError: nothing is attached that a weight can hold, a class that does not say which weight computes the
            same, it is merged already, a frozen weight that is quantised or no plain tensor, or a tensor holds a NaN or
            an infinity. Nothing has changed then.
    """
    found = {name: w for name, ws in all_wrappers(model).items() for w in ws if isinstance(w, MergeableLinear)}
    if not found:
        raise ValueError("no LoRA, nor any other update that a weight can hold, is attached: there is nothing to merge")
    if merged_wrappers(model):
        raise ValueError("the updates are merged already; unmerge(model) first")
    weights = {name: _checked_weight(name, wrapper) for name, wrapper in found.items()}
    for name, wrapper in found.items():
        wrapper.merge(weights[name])
    return model


def _checked_weight(name: str, wrapper: MergeableLinear) -> Tensor:
    _check_not_quantised(name, wrapper.base)
    frozen = wrapper.base.weight
    if type(frozen) not in (Tensor, nn.Parameter):
        raise ValueError(f"the weight of {name} is a {type(frozen).__name__}, not a plain tensor; use it unmerged")
    weight = wrapper.weight_to_merge()
    for tensor in (*wrapper.tensors().values(), weight):  # a NaN in A is lost where B is 0, but not what it says
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the update of {name} holds a NaN or an infinity, so nothing was merged")
    return weight


def _check_not_quantised(name: str, base: nn.Module) -> None:
    if isinstance(base, Quantized):
        raise ValueError(f"the weight of {name} is quantised, and cannot hold an update; dequantize(model) first")


def unmerge(model: nn.Module) -> nn.Module:
    """Forget the merged weights, in place; returns the model.

    Raises:
        ValueError: nothing is merged.
    """
    merged = merged_wrappers(model)
    if not merged:
        raise ValueError("nothing is merged; merge(model) first")
    for wrapper in merged.values():
        wrapper.merged_weight = None
    return model


def is_merged(model: nn.Module) -> bool:
    """Whether updates are merged at present."""
    return bool(merged_wrappers(model))


def merged_copy(model: nn.Module) -> nn.Module:
    """A copy with the updates in its weights and no wrapper left: the plain model, with its plain names.

    The model itself stays as it is. Modules named in `train_also` come along as they are.

    Raises:
        ValueError: what `merge` refuses; something else is attached; or a weight that is not the layer's alone: tied,
            pruned, parametrised, or of a layer with hooks, which see W0 x.
    """
    holders = [id(parameter) for module in model.modules() for parameter in module._parameters.values()]
    for name, wrappers in all_wrappers(model).items():
        if not all(isinstance(wrapper, MergeableLinear) for wrapper in wrappers):
            raise ValueError(
                f"a {type(wrappers[0]).__name__} is attached as well, which is no change of a weight; detach(model), "
                f"then attach or load alone what can be merged"
            )
        base = wrappers[-1].base
        _check_not_quantised(name, base)
        if not wrappers[-1].is_replaceable(base.weight) or holders.count(id(base.weight)) > 1:
            raise ValueError(
                f"the weight of {name} cannot be written to: it is tied to another module, pruned or parametrised, a "
                f"hook is on the layer, or autocast is on; merge(model) needs no writing"
            )
    twin = copy.deepcopy(model)
    if is_merged(twin):
        unmerge(twin)
    for wrapper in merged_wrappers(merge(twin)).values():
        wrapper.base.weight = nn.Parameter(wrapper.merged_weight)
    return restore(twin)

"""Folding: a prefix that comes from an MLP becomes the P_k and P_v that the MLP makes, and the MLP is dropped.

Source: Li & Liang 2021, section 4.3.
"""

from dataclasses import replace

import torch
from torch import nn

from peft.attach import attached, record_anew
from peft.functional import without_autocast
from peft.method import Method
from peft.methods.prefix import PrefixAttention, PrefixTuning
from peft.sites import all_wrappers


def fold(model: nn.Module) -> nn.Module:
    """Replace the MLP of each prefix by the P_k and P_v that it makes, in place; the outputs stay the same.

    Raises:
        ValueError: the model has no reparameterised prefix.
    """
    wrappers = [wrapper for at_site in all_wrappers(model).values() for wrapper in at_site]
    prefixes = [w for w in wrappers if isinstance(w, PrefixAttention) and w.recipe.reparameterize is not None]
    if not prefixes:
        raise ValueError("no prefix with an MLP is attached: there is nothing to fold (PrefixTuning(reparameterize=…))")
    for wrapper in prefixes:
        _fold_one(wrapper)
    record_anew(model, [replace(record, method=_folded(record.method)) for record in attached(model)])
    return model


def _folded(recipe: Method) -> Method:
    return replace(recipe, reparameterize=None) if isinstance(recipe, PrefixTuning) else recipe


@torch.no_grad()
def _fold_one(wrapper: PrefixAttention) -> None:
    tensors = {name: tensor for name, tensor in wrapper.tensors().items() if name != "gate"}
    with without_autocast(wrapper.source):
        made = wrapper.prefix()
    for name in tensors:
        delattr(wrapper, name)
    learns = any(tensor.requires_grad for tensor in tensors.values())
    wrapper.key, wrapper.value = (nn.Parameter(part, requires_grad=learns) for part in made)
    wrapper.recipe = _folded(wrapper.recipe)

"""Folding: a prefix that comes from an MLP becomes the P_k and P_v that the MLP makes, and the MLP is dropped.

Source: Li & Liang 2021, section 4.3.
"""

from dataclasses import replace

import torch
from torch import nn

from peft.attach import RECORD, Attached, attached, record_anew
from peft.methods.prefix import PrefixAttention
from peft.sites import arrange, sites_of


def fold(model: nn.Module) -> nn.Module:
    """Replace each prefix that comes from an MLP by the P_k and P_v that the MLP makes; the outputs stay the same.

    Raises:
        ValueError: the model has no reparameterised prefix, or it is disabled at present.
    """
    if not any(getattr(record.method, "reparameterize", None) for record in attached(model)):
        raise ValueError("no prefix with an MLP is attached: there is nothing to fold (PrefixTuning(reparameterize=…))")
    sites = sites_of(model).values()
    if not all(wrapper.enabled for site in sites for wrapper in site.wrappers):
        raise ValueError("the methods are disabled at present; fold after leaving disabled(model)")
    for site in sites:
        for wrapper in list(site.wrappers):
            if isinstance(wrapper, PrefixAttention) and wrapper.recipe.reparameterize is not None:
                new = folded(wrapper)
                vars(new)[RECORD] = vars(wrapper)[RECORD]
                arrange(site, [new if present is wrapper else present for present in site.wrappers])
    record_anew(model, _folded_record)
    return model


def _folded_record(record: Attached) -> Attached:
    if getattr(record.method, "reparameterize", None) is None:
        return record
    return replace(record, method=replace(record.method, reparameterize=None))


@torch.no_grad()
def folded(wrapper: PrefixAttention) -> PrefixAttention:
    """The plain `PrefixAttention` with the P_k and P_v that the network makes now."""
    key, value = wrapper.prefix()
    kept = {"gate": wrapper.gate} if wrapper.recipe.gated else {}
    recipe = replace(wrapper.recipe, reparameterize=None)
    plain = PrefixAttention(wrapper.base, recipe, {"key": key, "value": value, **kept})
    plain.training = wrapper.training
    return plain

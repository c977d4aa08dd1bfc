"""Whether somebody watches a module: then a fast form that goes round it would keep something from them."""

from torch import nn
from torch.nn.modules import module as of_all_modules

KINDS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def is_watched(*modules: nn.Module) -> bool:
    """Whether one of the modules has a hook of its own, or there is one for all modules."""
    watched = any(getattr(module, f"_{kind}") for module in modules for kind in KINDS)
    return watched or any(getattr(of_all_modules, f"_global_{kind}") for kind in KINDS)

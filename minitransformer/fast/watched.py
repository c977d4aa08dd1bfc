"""Whether somebody watches a module: then a fast form that goes round it would keep something from them."""

from torch import nn
from torch.nn.modules import module as of_all_modules


def is_watched(*modules: nn.Module) -> bool:
    """Whether one of the modules has a hook of its own, or there is one for all modules."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    forward = of_all_modules._global_forward_hooks or of_all_modules._global_forward_pre_hooks
    return bool(forward or of_all_modules._global_backward_hooks or of_all_modules._global_backward_pre_hooks)

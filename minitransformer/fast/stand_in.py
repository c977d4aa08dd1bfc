"""Whether a fast form may stand in for what some modules do: only where nobody could tell."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

PLAIN = (Tensor, nn.Parameter)


def may_stand_in(x: Tensor, *modules: nn.Module) -> bool:
    """Whether a fast form may go round the modules on the way from x: nobody watches them, and all is plain arithmetic.

    That is, no hook (nor one for all modules), no `forward` set on the module itself, no tensor of a foreign type
    (which may multiply in its own way), no autocast. Which classes the modules are of, the fast form has to know.
    """
    if type(x) not in PLAIN or torch.is_autocast_enabled(x.device.type):
        return False
    forward = of_all_modules._global_forward_hooks or of_all_modules._global_forward_pre_hooks
    if forward or of_all_modules._global_backward_hooks or of_all_modules._global_backward_pre_hooks:
        return False
    return all([_is_plain(module) for module in modules])


def _is_plain(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks or "forward" in module.__dict__:
        return False
    return all([tensor is None or type(tensor) in PLAIN for tensor in module._parameters.values()])

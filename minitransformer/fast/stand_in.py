"""Whether a fast form may stand in for what some modules do: only where nobody could tell."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from minitransformer.attention import is_transformed
from minitransformer.call import CALL, RECORDS

PLAIN = (Tensor, nn.Parameter)


def may_stand_in(x: Tensor, *modules: nn.Module) -> bool:
    """Whether a fast form may go round the modules on the way from x: nobody watches them, and all is plain arithmetic.

    That is: nobody records, no hook (nor one for all modules), no method set on the module itself, no `__call__` of its
    class's own, no tensor of a foreign type or layout (which may multiply in its own way), no autocast, no transform,
    no mode that takes calls of PyTorch's functions; and a compiler traces the plain form. (A dispatch mode sees what
    really runs.) Which classes the modules are of, the fast form has to know.
    """
    if torch.compiler.is_compiling() or is_transformed() or torch._C._len_torch_function_stack():
        return False
    if RECORDS in CALL.told or not _is_ordinary(x) or torch.is_autocast_enabled(x.device.type):
        return False
    forward = of_all_modules._global_forward_hooks or of_all_modules._global_forward_pre_hooks
    if forward or of_all_modules._global_backward_hooks or of_all_modules._global_backward_pre_hooks:
        return False
    return all([_is_plain(module) for module in modules])


def says(module: nn.Module, name: str) -> bool:
    """Whether the module's class has set the flag `name` itself: what a subclass computes, its parent cannot know."""
    return vars(type(module)).get(name, False)


def _is_plain(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks or type(module).__call__ is not nn.Module.__call__:
        return False
    if not _methods(type(module)).isdisjoint(module.__dict__):
        return False
    return all([tensor is None or _is_ordinary(tensor) for tensor in module._parameters.values()])


@cache
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.layout is torch.strided

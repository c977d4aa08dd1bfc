"""Attach, detach, disable: putting wrappers into a model, taking them out, and looking past them.

`attach` freezes the model, wraps the modules that the recipe names, and leaves every other object as it was. `detach`
puts the very same modules back and restores which tensors were trainable. What is attached stands in
`model.attached`, a list of records, so that it can be saved and printed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft.method import Method, Wrapper, switched_off
from peft.sites import all_wrappers, find, merged_wrappers, named_sites, named_tensors, sites_of, unwrap, wrap


@dataclass(frozen=True)
class Attached:
    """One method in a model: its recipe, its seed, and the modules that are trained whole beside it."""

    method: Method
    seed: int
    train_also: tuple[str, ...] = ()


def attached(model: nn.Module) -> list[Attached]:
    """What is attached to the model, in the order it was attached."""
    return list(getattr(model, "attached", []))


def attach(model: nn.Module, method: Method, seed: int = 0, train_also: tuple[str, ...] = ()) -> nn.Module:
    """Freeze the model and put the method's wrappers in, in place.

    Args:
        model: a `Transformer`, or a module that contains one, such as a `SequenceClassifier`.
        method: the recipe. Several methods may be attached one after the other.
        seed: of the method's random numbers.
        train_also: names of modules, by whole parts, that are trained whole beside the method, such as ("head",) for
            a fresh classification head. They travel with the method in `save`.

    Returns:
        The model itself.

    Raises:
        ValueError: a target matches nothing, a method of this kind is at that place already, or the recipe does not
            fit the model. Nothing has changed then.
    """
    if not isinstance(method, Method):
        raise ValueError(f"{method!r} is not a recipe; give one such as LoRA(rank=4) or PrefixTuning(length=8)")
    if not attached(model) and all_wrappers(model):
        raise ValueError("the model carries wrappers that attach did not put there, a TaskBank's; bank.detach() first")
    sites = sites_of(model)
    modules = {name: site.module for name, site in sites.items() if name}
    names = method.sites(modules)
    also = find(train_also, modules, "module") if train_also else []
    generator = torch.Generator().manual_seed(seed)
    wrappers = method.wrappers({name: modules[name] for name in names}, model, generator)
    for name, wrapper in wrappers.items():
        _refuse_a_second_one(name, sites[name].wrappers, wrapper)
    if not attached(model):
        model.trainable_before = trainability(model)
        model.attached = []
        model.requires_grad_(False)
    for name in also:
        modules[name].requires_grad_(True)
    for name, wrapper in wrappers.items():
        wrapper.training = modules[name].training
        wrap(sites[name], wrapper)
    model.attached.append(Attached(method, seed, tuple(train_also)))
    return model


def trainability(model: nn.Module) -> dict[str, bool]:
    """Which tensors require a gradient, by name."""
    return {name: p.requires_grad for name, p in named_tensors(model).items()}


def restore_trainability(model: nn.Module, before: dict[str, bool]) -> None:
    """Make every tensor trainable or not, as it was; one that came later stays as it is."""
    for name, parameter in named_tensors(model).items():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))


def detach(model: nn.Module) -> nn.Module:
    """Take every method out: the very same module objects as before `attach`, trainable as they were.

    Modules named in `train_also` keep the weights that training gave them.

    Raises:
        ValueError: nothing is attached.
    """
    _require_attached(model)
    for site in sites_of(model).values():
        if site.wrappers:
            unwrap(site)
    restore_trainability(model, model.trainable_before)
    del model.attached, model.trainable_before
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes in this thread what the frozen base computes, bit for bit. Nests; ends with an
    exception too.

    Modules named in `train_also` are not part of it: they stay as training left them.

    Raises:
        ValueError: nothing is attached.
    """
    _require_attached(model)
    wrappers = [wrapper for at_site in all_wrappers(model).values() for wrapper in at_site]
    with switched_off(*wrappers):
        yield model


def declared(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every tensor of the attached methods, once, by name: those of wrappers, and of modules named in `train_also`."""
    own = {id(p) for wrappers in all_wrappers(model).values() for w in wrappers for p in w.tensors().values()}
    modules = named_sites(model)
    for record in attached(model):
        for name in find(record.train_also, modules, "module") if record.train_also else []:
            own |= {id(p) for p in modules[name].parameters()}
    return {name: tensor for name, tensor in named_tensors(model).items() if id(tensor) in own}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every tensor that requires a gradient, by name; without a method attached, those of full fine-tuning."""
    return {name: p for name, p in named_tensors(model).items() if p.requires_grad}


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the methods' tensors, by site and tensor name, such as `blocks.0.attention.query.A`.

    Raises:
        ValueError: nothing is attached.
    """
    _require_attached(model)
    return {name: tensor.detach().clone() for name, tensor in declared(model).items()}


def load_state_dict(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, as `state_dict` gave them, into the attached methods.

    Raises:
        ValueError: a missing or unexpected name, a wrong shape, a NaN or an infinity, or the update is merged. The
            model is as it was then.
    """
    _require_attached(model)
    if merged_wrappers(model):
        raise ValueError("the updates are merged, and the merged update would go stale; unmerge(model) first")
    own = declared(model)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"the tensors do not belong to what is attached: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])})"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{name} has shape {list(tensors[name].shape)}, but what is attached needs {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{name} holds a NaN or an infinity; take tensors from before the training went wrong")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _require_attached(model: nn.Module) -> None:
    if not attached(model):
        raise ValueError("no method is attached to this model; attach(model, LoRA(...)) or load(model, path) first")


def _refuse_a_second_one(name: str, present: list[Wrapper], new: Wrapper) -> None:
    for wrapper in present:
        kind, other = type(wrapper).__name__, type(new).__name__
        same_kind = isinstance(wrapper, type(new)) or isinstance(new, type(wrapper))
        if same_kind or set(wrapper.tensors()) & set(new.tensors()):
            raise ValueError(
                f"{name} carries a {kind} already, and another {other} cannot stand beside it; detach(model) first, "
                f"or choose other targets"
            )
        if wrapper.order == new.order:
            raise ValueError(
                f"{name} carries a {kind}, and what it computes with a {other} would depend on which came first: both "
                f"have order {new.order}; give one of the classes another `order`, or choose other targets"
            )

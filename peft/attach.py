"""Attach, detach, disable: putting wrappers into a model, taking them out, and looking past them.

What must be known is kept where it belongs: a wrapper, or a module that is trained whole, carries the record of its
method, and a frozen module which of its tensors were trainable. So a part of a model, a copy, and a model that was
rearranged know what is attached to them.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minitransformer.modes import modes_restored
from peft.method import Method, Wrapper, switched_off
from peft.sites import Site, arrange, merged_wrappers, named, named_tensors, own_tensors, sites_of

RECORD, TRAINABLE = "peft_record", "_peft_trainable"  # attributes of modules
READ_BY_PARENT = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they use a child's weight and do not call it


@dataclass(frozen=True)
class Attached:
    """One method in a model: its recipe, its seed, and the modules that are trained whole beside it."""

    method: Method
    seed: int
    train_also: tuple[str, ...] = ()
    order: int = field(default=0, compare=False, repr=False)  # of attaching


def parts_of(sites: dict[str, Site]) -> Iterator[tuple[str, nn.Module, Attached | None]]:
    """Every wrapper, and every module that is trained whole, by the name of its site, with the record of its method."""
    for name, site in sites.items():
        for part in site.parts:
            if isinstance(part, Wrapper) or RECORD in vars(part):
                yield name, part, vars(part).get(RECORD)


def attached(model: nn.Module) -> list[Attached]:
    """What is attached to the model, in the order it was attached."""
    records = {id(record): record for _, _, record in parts_of(sites_of(model)) if record}
    return sorted(records.values(), key=lambda record: record.order)


def record_anew(model: nn.Module, records: list[Attached]) -> None:
    """Replace the records of what is attached by these, in the same order."""
    anew = dict(zip(map(id, attached(model)), records, strict=True))
    for _, part, record in parts_of(sites_of(model)):
        vars(part)[RECORD] = anew.get(id(record))


def attach(model: nn.Module, method: Method, seed: int = 0, train_also: tuple[str, ...] = ()) -> nn.Module:
    """Freeze the model, and wrap the modules that the recipe names, in place; every other object stays as it was.

    Args:
        model: a `Transformer`, or a module that contains one, such as a `SequenceClassifier`; a handle of
            `torch.compile` stands for the model in it.
        method: the recipe. Several methods may be attached one after the other.
        seed: of the method's random numbers.
        train_also: names of modules (see `peft.sites.named`) that are trained whole beside the method, such as
            ("head",) for a fresh classification head. They travel with the method in `save`, with their buffers.

    Raises:
        ValueError: a target matches nothing, a method of this kind is at that place already, the recipe does not fit
            the model, or something would be without effect. Nothing has changed then.
    """
    if not isinstance(method, Method):
        raise ValueError(f"{method!r} is not a recipe; give one such as LoRA(rank=4) or PrefixTuning(length=8)")
    sites, seed = sites_of(model), operator.index(seed)
    records = [record for _, _, record in parts_of(sites)]
    _check_model(model, records)
    root, modules = sites[""].module, {name: site.module for name, site in sites.items() if name}
    whole = [module for name in named(train_also, modules) for module in _trained_whole(name, modules[name])]
    with modes_restored(root), torch.inference_mode(False):
        entered, generator = method.sites(modules), torch.Generator().manual_seed(seed)
        wrappers = method.wrappers({name: modules[name] for name in entered}, root, generator)
    if not wrappers:
        raise ValueError(f"{method} has nowhere to enter: this model has none of the modules it is made for")
    for name, wrapper in wrappers.items():
        _check_wrapper(name, sites, wrapper)
    order = 1 + max([record.order for record in records], default=-1)
    record = Attached(method, seed, tuple(map(str, train_also)), order)
    freeze(sites)
    for module in whole:
        vars(module)[RECORD] = record
        for tensor in own_tensors(module).values():
            tensor.requires_grad_(True)
    for name, wrapper in wrappers.items():
        vars(wrapper)[RECORD] = record
        for part in {*wrapper.modules()} - {*wrapper.base.modules()}:
            part.training = modules[name].training
        arrange(sites[name], [*sites[name].wrappers, wrapper])
    return model


def freeze(sites: dict[str, Site]) -> None:
    """Make no tensor trainable but those of methods, and let each module remember which were, if it does not yet."""
    own = {site.module: own_tensors(site.module) for site in sites.values()}
    for module, tensors in own.items():
        vars(module).setdefault(TRAINABLE, {name: tensor.requires_grad for name, tensor in tensors.items()})
    trained = {t for module, tensors in own.items() if RECORD in vars(module) for t in tensors.values()}
    for tensor in {t for tensors in own.values() for t in tensors.values()} - trained:
        tensor.requires_grad_(False)


def restore(model: nn.Module) -> nn.Module:
    """Take every wrapper out, and make tensors trainable or not, as before `freeze`; those that came later stay."""
    before: dict[Tensor, bool] = {}
    for site in sites_of(model).values():
        if site.wrappers:
            arrange(site, [])
        vars(site.module).pop(RECORD, None)
        remembered, tensors = vars(site.module).pop(TRAINABLE, {}), own_tensors(site.module)
        for name in remembered.keys() & tensors.keys():  # a tensor of two modules may have been frozen by the first
            before[tensors[name]] = before.get(tensors[name], False) or remembered[name]
    for tensor, trainable in before.items():
        tensor.requires_grad_(trainable and _can_be_trained(tensor))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take every method out, of a model or a part: the very same module objects as before `attach`, trainable as they
    were. Modules named in `train_also` keep their trained weights. ValueError if nothing is attached."""
    _require_attached(model)
    return restore(model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes in this thread what the frozen base computes, bit for bit; but modules named in
    `train_also` stay as training left them. Nests; ends with an exception too. ValueError if nothing is attached. With
    `torch.utils.checkpoint` of your own, or in a coroutine, enter it inside of what is run."""
    _require_attached(model)
    with switched_off(*[wrapper for site in sites_of(model).values() for wrapper in site.wrappers]):
        yield model


def declared(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the attached methods, once, by name: of wrappers, and of what is trained whole."""
    own = {id(t) for _, part, _ in parts_of(sites_of(model)) for t in own_tensors(part, buffers=True).values()}
    return {name: tensor for name, tensor in named_tensors(model, buffers=True).items() if id(tensor) in own}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every tensor that requires a gradient, by name; without a method attached, those of full fine-tuning."""
    return {name: p for name, p in named_tensors(model).items() if p.requires_grad}


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the methods' tensors, by names such as `blocks.0.attention.query.A`; ValueError if there is none."""
    _require_attached(model)
    return {name: tensor.detach().clone() for name, tensor in declared(model).items()}


def load_state_dict(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, as `state_dict` gave them, into the attached methods. ValueError for a missing or unexpected name,
    a wrong shape or type, a NaN or an infinity, or a merged update; the model is as it was then."""
    _require_attached(model)
    if merged_wrappers(model):
        raise ValueError("the updates are merged, and the merged update would go stale; unmerge(model) first")
    own = declared(model)
    lost, more = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if lost or more:
        raise ValueError(f"tensors of another kind: {len(lost)} missing {lost[:3]}, {len(more)} unexpected {more[:3]}")
    for name, tensor in own.items():
        given, needed = tensors[name], f"{list(tensor.shape)} of {tensor.dtype}"
        if tensor.shape != given.shape or not torch.can_cast(given.dtype, tensor.dtype):
            raise ValueError(f"{name} has shape {list(given.shape)} of {given.dtype}; what is attached needs {needed}")
        if not bool(torch.isfinite(given.to(tensor.dtype)).all()):
            raise ValueError(f"{name} holds a NaN or an infinity; take tensors from before the training went wrong")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _can_be_trained(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_inference()


def _require_attached(model: nn.Module) -> None:
    if not attached(model):
        raise ValueError("no method is attached to this model; attach(model, LoRA(...)) or load(model, path) first")


def _check_model(model: nn.Module, records: list[Attached | None]) -> None:
    if any([isinstance(module, DistributedDataParallel) for module in model.modules()]):
        raise ValueError("DistributedDataParallel knows the tensors that were there first; attach the method before it")
    if any([nn.parameter.is_lazy(tensor) for tensor in model.parameters()]):
        raise ValueError("the model has parameters without a shape so far; run it once before attaching")
    if None in records:
        raise ValueError("the model carries wrappers that attach did not put there; bank.detach() first")


def _trained_whole(name: str, module: nn.Module) -> list[nn.Module]:
    modules = [site.module for site in sites_of(module).values()]
    tensors = [tensor for module in modules for tensor in own_tensors(module).values()]
    if not tensors or not all(map(_can_be_trained, tensors)):
        raise ValueError(f"train_also names {name}, which holds no parameters that can be trained; leave it out")
    return modules


def _check_wrapper(name: str, sites: dict[str, Site], new: Wrapper) -> None:
    """Raise ValueError, with the cure, for a wrapper that would be bypassed, or not be told from another."""
    kind, tensors, module, outermost = type(new).__name__, new.tensors(), sites[name].module, sites[name].parts[0]
    for parent, attribute in [place for site in sites.values() if site.module is module for place in site.places]:
        if isinstance(parent, READ_BY_PARENT):
            raise ValueError(f"torch's layers read the weight of {name} and do not call it; choose others as targets")
        if parent._modules[attribute] is not outermost:
            raise ValueError(f"{name} is compiled by itself, which would pass a {kind} by; compile it after attaching")
    if any(own_tensors(inner, buffers=True) for inner in {*new.modules()} - {*module.modules(), new}):
        raise ValueError(f"{kind} holds parameters in a module of its own; give the wrapper itself every nn.Parameter")
    if tensors.keys() & own_tensors(module, buffers=True).keys():
        raise ValueError(f"{name} has tensors called {', '.join(tensors)} of its own; rename them, or those of {kind}")
    for present in sites[name].wrappers:
        if present.order == new.order or present.tensors().keys() & tensors.keys():
            raise ValueError(
                f"{name} carries a {type(present).__name__} already, and a {kind} cannot stand beside it: both "
                f"have order {new.order}, or tensors of one name; detach(model) first, or choose other targets"
            )

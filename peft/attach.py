"""Attach, detach, disable: putting wrappers into a model, taking them out, and looking past them.

`attach` freezes the model, wraps the modules that the recipe names, and leaves every other object as it was. `detach`
puts the very same modules back and restores which tensors were trainable.

What must be known for that is kept where it belongs: a wrapper, or a module that is trained whole, carries the record
of its method, and a frozen module which of its tensors were trainable. So a part of a model, a copy, and a model that
was rearranged know what is attached to them.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minitransformer.modes import modes_restored
from peft.method import Method, Wrapper, switched_off
from peft.sites import Site, arrange, inside, merged_wrappers, named, named_tensors, own_tensors, sites_of, wrap

RECORD, TRAINABLE = "peft_record", "_peft_trainable"  # attributes of modules
READ_BY_PARENT = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they use a child's weight and do not call it


@dataclass(frozen=True)
class Attached:
    """One method in a model: its recipe, its seed, and the modules that are trained whole beside it."""

    method: Method
    seed: int
    train_also: tuple[str, ...] = ()
    order: int = field(default=0, compare=False, repr=False)  # of attaching


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Attached | None]]:
    """Every wrapper, and every module that is trained whole, by the name of its site, with the record of its method."""
    for name, site in sites_of(model).items():
        for part in (*site.wrappers, site.module):
            if isinstance(part, Wrapper) or RECORD in vars(part):
                yield name, part, vars(part).get(RECORD)


def attached(model: nn.Module) -> list[Attached]:
    """What is attached to the model, in the order it was attached."""
    records = {id(record): record for _, _, record in parts_of(model) if record}
    return sorted(records.values(), key=lambda record: record.order)


def record_anew(model: nn.Module, change: Callable[[Attached], Attached]) -> None:
    """Replace the record of each method that is attached by what `change` makes of it."""
    changed = {id(record): change(record) for record in attached(model)}
    for _, part, record in parts_of(model):
        vars(part)[RECORD] = changed.get(id(record))


def attach(model: nn.Module, method: Method, seed: int = 0, train_also: tuple[str, ...] = ()) -> nn.Module:
    """Freeze the model and put the method's wrappers in, in place.

    Args:
        model: a `Transformer`, or a module that contains one, such as a `SequenceClassifier`; a handle of
            `torch.compile` stands for the model in it.
        method: the recipe. Several methods may be attached one after the other.
        seed: of the method's random numbers.
        train_also: names of modules (see `peft.sites.find`) that are trained whole beside the method, such as
            ("head",) for a fresh classification head. They travel with the method in `save`, with their buffers.

    Returns:
        The model itself.

    Raises:
        ValueError: a target matches nothing, a method of this kind is at that place already, the recipe does not fit
            the model, or something would be without effect. Nothing has changed then.
    """
    if not isinstance(method, Method):
        raise ValueError(f"{method!r} is not a recipe; give one such as LoRA(rank=4) or PrefixTuning(length=8)")
    root, sites, seed = inside(model), sites_of(model), operator.index(seed)
    modules = {name: site.module for name, site in sites.items() if name}
    also = named(train_also, modules)
    whole = {name: [m for below, m in modules.items() if f"{below}.".startswith(f"{name}.")] for name in also}
    generator = torch.Generator().manual_seed(seed)
    _check_model(model)
    with modes_restored(root), torch.inference_mode(False):
        wrappers = method.wrappers({name: modules[name] for name in method.sites(modules)}, root, generator)
    _check(sites, wrappers, whole)
    order = 1 + max([record.order for record in attached(model)], default=-1)
    record = Attached(method, seed, tuple(map(str, train_also)), order)
    freeze(root)
    for module in chain(*whole.values()):
        vars(module)[RECORD] = record
        for tensor in own_tensors(module).values():
            tensor.requires_grad_(True)
    for name, wrapper in wrappers.items():
        vars(wrapper)[RECORD] = record
        for part in {*wrapper.modules()} - {*wrapper.base.modules()}:
            part.training = modules[name].training
        wrap(sites[name], wrapper)
    return model


def freeze(model: nn.Module) -> None:
    """Make no tensor trainable but those of methods, and let each module remember which were, if it does not yet."""
    fresh = [site.module for site in sites_of(model).values() if TRAINABLE not in vars(site.module)]
    for module in fresh:
        vars(module)[TRAINABLE] = {name: p.requires_grad for name, p in own_tensors(module).items()}
    modules = [site.module for site in sites_of(model).values()]
    trained = {t for module in modules if RECORD in vars(module) for t in own_tensors(module).values()}
    for module in modules:
        for tensor in {*own_tensors(module).values()} - trained:
            tensor.requires_grad_(False)


def thaw(model: nn.Module) -> None:
    """Make every tensor trainable or not, as it was before `freeze`; one that came later stays as it is."""
    before: dict[Tensor, bool] = {}
    for site in sites_of(model).values():
        remembered, tensors = vars(site.module).pop(TRAINABLE, {}), own_tensors(site.module)
        for name in remembered.keys() & tensors.keys():  # a tensor of two modules may have been frozen by the first
            before[tensors[name]] = before.get(tensors[name], False) or remembered[name]
    for tensor, trainable in before.items():
        tensor.requires_grad_(trainable and _can_be_trained(tensor))


def detach(model: nn.Module) -> nn.Module:
    """Take every method out: the very same module objects as before `attach`, trainable as they were.

    Modules named in `train_also` keep the weights that training gave them. Of a part of a model, what is in it is
    taken out.

    Raises:
        ValueError: nothing is attached.
    """
    _require_attached(model)
    return without_wrappers(model)


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model with every method taken out, and whatever weights it has at present."""
    for site in sites_of(model).values():
        arrange(site, [wrapper for wrapper in site.wrappers if RECORD not in vars(wrapper)])
        vars(site.module).pop(RECORD, None)
    thaw(model)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes in this thread what the frozen base computes, bit for bit. Nests; ends with an
    exception too.

    Modules named in `train_also` are not part of it: they stay as training left them. With `torch.utils.checkpoint` of
    your own, or in a coroutine, enter it inside of what is run.

    Raises:
        ValueError: nothing is attached.
    """
    _require_attached(model)
    with switched_off(*[part for _, part, _ in parts_of(model) if isinstance(part, Wrapper)]):
        yield model


def declared(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the attached methods, once, by name: of wrappers, and of what is trained whole."""
    own = {id(tensor) for _, part, _ in parts_of(model) for tensor in own_tensors(part, buffers=True).values()}
    return {name: tensor for name, tensor in named_tensors(model, buffers=True).items() if id(tensor) in own}


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
        ValueError: a missing or unexpected name, a wrong shape or type, a NaN or an infinity, or the update is merged.
            The model is as it was then.
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
        given = tensors[name]
        if tensor.shape != given.shape or not torch.can_cast(given.dtype, tensor.dtype):
            wanted = f"{list(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{name} has shape {list(given.shape)} of {given.dtype}; what is attached needs {wanted}")
        if not bool(torch.isfinite(given).all()):
            raise ValueError(f"{name} holds a NaN or an infinity; take tensors from before the training went wrong")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _can_be_trained(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_inference()


def _require_attached(model: nn.Module) -> None:
    if not attached(model):
        raise ValueError("no method is attached to this model; attach(model, LoRA(...)) or load(model, path) first")


def _check_model(model: nn.Module) -> None:
    """Raise ValueError, with the cure, for a model that nothing can be attached to."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("DistributedDataParallel knows the tensors that were there first; attach the method before it")
    if any(nn.parameter.is_lazy(tensor) for tensor in model.parameters()):
        raise ValueError("the model has parameters without a shape so far; run it once before attaching")
    for _, part, record in parts_of(model):
        if record is None:
            kind = type(part).__name__
            raise ValueError(f"the model carries wrappers that attach did not put there ({kind}); bank.detach() first")


def _check(sites: dict[str, Site], wrappers: dict[str, Wrapper], whole: dict) -> None:
    """Raise ValueError, with the cure, for what cannot be attached, or would be without effect."""
    for name, modules in whole.items():
        tensors = [tensor for module in modules for tensor in own_tensors(module).values()]
        if not tensors or not all(map(_can_be_trained, tensors)):
            raise ValueError(f"train_also names {name}, which holds no parameters that can be trained; leave it out")
    for name, wrapper in wrappers.items():
        _check_place(name, sites[name], wrapper)
        for present in sites[name].wrappers:
            _check_pair(name, present, wrapper)


def _check_place(name: str, site: Site, new: Wrapper) -> None:
    kind, tensors = type(new).__name__, new.tensors()
    if any(isinstance(parent, READ_BY_PARENT) for parent, _ in site.places):
        raise ValueError(
            f"torch's attention and encoder layers read the weight of {name} and do not call it, so a {kind} would be "
            f"passed by; choose other targets, or write the layer with linear layers that are called"
        )
    if any(parent._modules[attribute] is not [*site.wrappers, site.module][0] for parent, attribute in site.places):
        raise ValueError(f"{name} is compiled by itself, which would pass a {kind} by; compile it after attaching")
    if {*new.parameters()} - {*site.module.parameters(), *tensors.values()}:
        raise ValueError(f"{kind} holds parameters in a module of its own; give the wrapper itself every nn.Parameter")
    if tensors.keys() & own_tensors(site.module, buffers=True).keys():
        raise ValueError(f"{name} has tensors called {', '.join(tensors)} of its own; rename them, or those of {kind}")


def _check_pair(name: str, present: Wrapper, new: Wrapper) -> None:
    kind, other = type(present).__name__, type(new).__name__
    same_kind = isinstance(present, type(new)) or isinstance(new, type(present))
    if same_kind or present.tensors().keys() & new.tensors().keys():
        raise ValueError(
            f"{name} carries a {kind} already, and another {other} cannot stand beside it; detach(model) first, "
            f"or choose other targets"
        )
    if present.order == new.order:
        raise ValueError(
            f"{name} carries a {kind}, and what it computes with a {other} would depend on which came first: both "
            f"have order {new.order}; give one of the classes another `order`, or choose other targets"
        )

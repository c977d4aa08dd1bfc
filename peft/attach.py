"""Attach, detach, disable: putting wrappers into a model, taking them out, and looking past them.

`attach` freezes the model, wraps the modules that the recipe names, and leaves every other object as it was. `detach`
puts the very same modules back and restores which tensors were trainable.

What must be known for that is kept where it belongs: a wrapper, or a module that is trained whole, carries the record
of its method, and a frozen module which of its tensors were trainable. So a part of a model, a copy, and a model that
was rearranged know what is attached to them.
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
from peft.plain import plain
from peft.sites import Site, all_wrappers, arrange, find, inside, merged_wrappers, named_tensors, own_tensors, sites_of, wrap

RECORD, TRAINABLE = "_peft_record", "_peft_trainable"  # attributes of modules
READ_BY_PARENT = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they use a child's weight and do not call it


@dataclass(frozen=True)
class Attached:
    """One method in a model: its recipe, its seed, and the modules that are trained whole beside it."""

    method: Method
    seed: int
    train_also: tuple[str, ...] = ()
    order: int = field(default=0, compare=False, repr=False)  # of attaching


def record_of(module: nn.Module) -> Attached | None:
    """The record of the method that a wrapper, or a module that is trained whole, belongs to."""
    return vars(module).get(RECORD)


def set_record(module: nn.Module, record: Attached | None) -> None:
    """Say which method a wrapper, or a module that is trained whole, belongs to."""
    vars(module)[RECORD] = record


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every wrapper, and every module that is trained whole, with the name of its site."""
    for name, site in sites_of(model).items():
        for part in (*site.wrappers, site.module):
            if record_of(part) or isinstance(part, Wrapper):
                yield name, part


def attached(model: nn.Module) -> list[Attached]:
    """What is attached to the model, in the order it was attached."""
    records = {id(record): record for _, part in parts_of(model) if (record := record_of(part))}
    return sorted(records.values(), key=lambda record: record.order)


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
            the model or holds what no file could, or a module to wrap is never called. Nothing has changed then.
    """
    if not isinstance(method, Method):
        raise ValueError(f"{method!r} is not a recipe; give one such as LoRA(rank=4) or PrefixTuning(length=8)")
    method, root, sites = plain(method), inside(model), sites_of(model)
    modules = {name: site.module for name, site in sites.items() if name}
    also = find(train_also, modules, "module") if train_also else []
    whole = {module: name for name in also for module in _below(name, modules)}
    with modes_restored(root):
        names = method.sites(modules)
        wrappers = method.wrappers({name: modules[name] for name in names}, root, _generator(seed))
    _check(model, sites, wrappers, whole)
    order = 1 + max([record.order for record in attached(model)], default=-1)
    record = Attached(method, operator.index(seed), tuple(map(str, train_also)), order)
    freeze(root)
    for module in whole:
        set_record(module, record)
        for tensor in own_tensors(module).values():
            tensor.requires_grad_(True)
    for name, wrapper in wrappers.items():
        set_record(wrapper, record)
        for part in {*wrapper.modules()} - {*wrapper.base.modules()}:
            part.training = modules[name].training
        wrap(sites[name], wrapper)
    return model


def freeze(model: nn.Module) -> None:
    """Make no tensor trainable, and let each module remember which were; a module that remembers stays as it is."""
    fresh = [site.module for site in sites_of(model).values() if TRAINABLE not in vars(site.module)]
    for module in fresh:
        vars(module)[TRAINABLE] = {name: p.requires_grad for name, p in own_tensors(module).items()}
    for module in fresh:
        for tensor in own_tensors(module).values():
            tensor.requires_grad_(False)


def thaw(model: nn.Module) -> None:
    """Make every tensor trainable or not, as it was before `freeze`; one that came later stays as it is."""
    before: dict[Tensor, bool] = {}
    for site in sites_of(model).values():
        remembered, tensors = vars(site.module).pop(TRAINABLE, {}), own_tensors(site.module)
        for name in remembered.keys() & tensors.keys():  # a tensor of two modules may have been frozen by the first
            before[tensors[name]] = before.get(tensors[name], False) or remembered[name]
    for tensor, trainable in before.items():
        tensor.requires_grad_(trainable and (tensor.is_floating_point() or tensor.is_complex()))


def detach(model: nn.Module) -> nn.Module:
    """Take every method out: the very same module objects as before `attach`, trainable as they were.

    Modules named in `train_also` keep the weights that training gave them. Of a part of a model, what is in it is
    taken out.

    Raises:
        ValueError: nothing is attached.
    """
    _require_attached(model)
    for _, part in parts_of(model):
        if isinstance(part, Wrapper):
            part.release()
    return without_wrappers(model)


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model with every method taken out, and whatever weights it has at present."""
    for site in sites_of(model).values():
        arrange(site, [wrapper for wrapper in site.wrappers if record_of(wrapper) is None])
        vars(site.module).pop(RECORD, None)
    thaw(model)
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


def declared(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the attached methods, once, by name: the parameters and buffers of wrappers, and of modules named
    in `train_also`."""
    own = {id(tensor) for _, part in parts_of(model) for tensor in own_tensors(part, buffers=True).values()}
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
        ValueError: a missing or unexpected name, a wrong shape or kind of number, a NaN or an infinity, or the update
            is merged. The model is as it was then.
    """
    _require_attached(model)
    if merged_wrappers(model):
        raise ValueError("the weights hold a merged update, which would go stale; unmerge(model) first")
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


def _generator(seed: int) -> torch.Generator:
    try:
        return torch.Generator().manual_seed(operator.index(seed))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"seed={seed!r} is no seed; give a whole number below 2**63") from error


def _below(name: str, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """The module of that name and all modules in it."""
    return [module for below, module in modules.items() if f"{below}.".startswith(f"{name}.")]


def _require_attached(model: nn.Module) -> None:
    if not attached(model):
        raise ValueError("no method is attached to this model; attach(model, LoRA(...)) or load(model, path) first")


def _check(model: nn.Module, sites: dict[str, Site], wrappers: dict[str, Wrapper], whole: dict) -> None:
    """Raise ValueError, with the cure, for what cannot be attached, or not so that it would count."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("DistributedDataParallel knows the tensors of when it was made only; attach the method first")
    unknown = [name for name, part in parts_of(model) if record_of(part) is None]
    if unknown:
        raise ValueError(f"{unknown[0]} carries a wrapper that attach did not put there; take it out first (detach)")
    for name in dict.fromkeys(whole.values()):
        tensors = [t for module in whole if whole[module] == name for t in own_tensors(module).values()]
        if not tensors or not all(t.is_floating_point() or t.is_complex() for t in tensors):
            raise ValueError(f"train_also names {name}, which holds no parameters that can be trained; leave it out")
    for name, wrapper in wrappers.items():
        _check_site(name, sites[name], wrapper)


def _check_site(name: str, site: Site, new: Wrapper) -> None:
    kind, tensors = type(new).__name__, new.tensors()
    for parent, attribute in site.places:
        if isinstance(parent, READ_BY_PARENT):
            raise ValueError(
                f"torch's {type(parent).__name__} reads the weight of {name} and does not call it, so a {kind} there "
                f"would be passed by; choose other targets, or write the layer with linear layers that are called"
            )
        if parent._modules[attribute] is not (site.wrappers or [site.module])[0]:
            raise ValueError(f"{name} is compiled by itself, which would pass a {kind} by; compile it after attaching")
    inner = {id(t) for t in (*site.module.parameters(), *tensors.values())}
    if any(id(t) not in inner for t in new.parameters()):
        raise ValueError(f"{kind} holds parameters in a module of its own; give the wrapper itself every nn.Parameter")
    if set(tensors) & set(own_tensors(site.module, buffers=True)):
        raise ValueError(f"{name} has tensors called {', '.join(tensors)} of its own; rename them, or those of {kind}")
    for wrapper in site.wrappers:
        present = type(wrapper).__name__
        same_kind = isinstance(wrapper, type(new)) or isinstance(new, type(wrapper))
        if same_kind or set(wrapper.tensors()) & set(tensors):
            raise ValueError(
                f"{name} carries a {present} already, and another {kind} cannot stand beside it; detach(model) first, "
                f"or choose other targets"
            )
        if wrapper.order == new.order:
            raise ValueError(
                f"{name} carries a {present}, and what it computes with a {kind} would depend on which came first: "
                f"both have order {new.order}; give one of the classes another `order`, or choose other targets"
            )

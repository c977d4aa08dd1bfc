"""What all methods share: a recipe says what to attach and where, a wrapper holds the tensors and computes.

    recipe   (`Method`)    a frozen dataclass of plain values: can be printed, compared, and written to a file
    wrapper  (`Wrapper`)   a module round one frozen module, `base`, with a few explicit `nn.Parameter`s

A method of your own is one subclass of each: `sites` names the modules to wrap, `wrap` makes the wrapper round one of
them, `expected_parameters` says in closed form how many parameters that trains.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from itertools import chain
from types import UnionType
from typing import ClassVar, get_args, get_origin

import torch
from torch import Generator, Tensor, nn

from minitransformer.attention import Attention
from minitransformer.call import CALL, telling
from minitransformer.config import TransformerConfig

LinearMap = tuple[Tensor, Tensor | None]  # weight [d_out, d_in] and bias [d_out]
KeysAndValues = tuple[Tensor, Tensor]  # [n, H_kv d_head] each


class Wrapper(nn.Module):
    """A thin layer round one frozen module. Its own parameters are the method's tensors; `base` is what it wraps.

    It gives what `base` gives, in shape and precision; with `enabled` off it computes what `base` computes, bit for
    bit. Where several share a place, `order` says how far out each lies, whatever the order they came in: 0 for those
    that change what the frozen module itself computes, more for those that work on its input or output.

    `as_linear` and `as_attention` are answers to those who would compute the same in another way. A class that has a
    `forward` of its own gives its own answers, or none: what it computes, its parent cannot know. Nor does it inherit
    `position_wise`: that a position's output depends on no other position, and attention inside gets the same input.
    """

    order: ClassVar[int] = 1
    merged: bool = False  # whether a weight with its update stands in for the frozen one at present

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    @property
    def enabled(self) -> bool:
        """Whether it takes part in this pass; off inside `disabled`."""
        return id(self) not in CALL.told

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            for answer in {"as_linear", "as_attention"} - vars(cls).keys():
                setattr(cls, answer, vars(Wrapper)[answer])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors().items())

    def tensors(self) -> dict[str, Tensor]:
        """The method's parameters (or what stands in for them at present), without those of the wrapped module."""
        return dict(self.named_parameters(recurse=False))

    def frozen_tensors(self) -> set[str]:
        """The names of those tensors that the recipe keeps fixed on purpose."""
        return set()

    def as_linear(self) -> LinearMap | None:
        """The weight and bias by which it acts at present, if it is a linear layer with these and nothing more."""
        return None

    def as_attention(self) -> tuple[Attention, KeysAndValues | None] | None:
        """The layer inside and the keys and values it puts in front, if it is attention with these and nothing more."""
        return None

    def keys_and_values(self, x: Tensor) -> KeysAndValues:
        """What the attention layer inside answers at x, the wrapper's own input."""
        return self.base.keys_and_values(x)


def switched_off(*wrappers: Wrapper) -> AbstractContextManager:
    """Inside, these wrappers compute in this thread what their `base` computes."""
    return telling({id(wrapper): wrapper for wrapper in wrappers})


def unwrapped(module: nn.Module) -> nn.Module:
    """The frozen module inside all wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def linear_map(module: nn.Module) -> LinearMap | None:
    """The weight and the bias by which a module acts at present; None if it does not say, or is no linear layer."""
    if isinstance(module, Wrapper):
        return module.as_linear()
    return (module.weight, module.bias) if type(module) is nn.Linear else None


def can_hold(weight: Tensor, *changes: Tensor) -> bool:
    """Whether these changes can be written into the weight: 16 bits would round a small one away."""
    return weight.dtype in (torch.float32, torch.float64) and all(change.dtype == weight.dtype for change in changes)


@dataclass(frozen=True)
class Method(ABC):
    """A recipe: everything needed to attach a method again, as plain values. NumPy's and PyTorch's scalars become
    Python's, and lists become tuples: that is what a file gives back.

    Raises:
        ValueError: a value of another type than its field says, not finite, or outside of its limit
            (`Annotated[type, check]`); on defining a class, another one of its name: a file would not know which it
            means.
    """

    registry: ClassVar[dict[str, type["Method"]]] = {}

    def __post_init__(self):
        for f in fields(self):
            value, limits = plain(getattr(self, f.name)), getattr(f.type, "__metadata__", ())  # of Annotated[…]
            hint = f.type.__origin__ if limits else f.type
            if not fits(value, hint):
                kind = hint.__name__ if isinstance(hint, type) else hint
                example = f"; one in a tuple is ({value!r},)" if isinstance(value, str) else ""
                raise ValueError(f"{f.name} must be {kind}, finite and of 64 bits, got {value!r}{example}")
            for check in limits:
                check(f.name, value)
            object.__setattr__(self, f.name, value)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        known = Method.registry.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"there is a method {cls.__name__} already, in {known.__module__}; choose another name")
        Method.registry[cls.__name__] = cls  # a notebook's cell that ran again

    @abstractmethod
    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """The names of the modules to wrap, out of all of the model's; ValueError for a target that matches none."""

    @abstractmethod
    def wrap(self, name: str, module: nn.Module, model: nn.Module, generator: Generator) -> Wrapper:
        """The wrapper for one site: `module` is what it wraps, `generator` draws its random numbers."""

    def wrappers(self, modules: dict[str, nn.Module], model: nn.Module, generator: Generator) -> dict[str, Wrapper]:
        """The wrapper for each site, by name. A tensor that wrappers share is made here: one `nn.Parameter` that each
        of them holds. It stays one when the model is copied, moved or cast, counts once, and is in a file once."""
        return {name: self.wrap(name, module, model, generator) for name, module in modules.items()}

    @abstractmethod
    def expected_parameters(self, config: TransformerConfig) -> int:
        """How many parameters the method trains in a Transformer of that shape, in closed form."""

    def __str__(self) -> str:
        """The recipe as it could be typed: without the options that have their default value."""
        own_first = sorted(fields(self), key=lambda f: f.kw_only)
        given = [f for f in own_first if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def as_dict(self) -> dict:
        """The recipe as plain values, with its name, ready for JSON."""
        return {"method": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @staticmethod
    def from_dict(values: dict) -> "Method":
        """The recipe that `as_dict` described; ValueError for an unknown method or a field that does not fit."""
        values = {key: plain(value) for key, value in values.items()}
        name = values.pop("method", None)
        if name not in Method.registry:
            known = ", ".join(sorted(Method.registry))
            raise ValueError(f"the method {name!r} is unknown; known are {known}; of your own, import its file first")
        try:
            return Method.registry[name](**values)
        except TypeError as error:
            raise ValueError(f"the recipe of {name} does not fit this version: {error}") from error


def plain(value):
    """The same value in plain Python: NumPy's or PyTorch's scalars and arrays, and lists, become numbers and tuples."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(plain(entry) for entry in value) if isinstance(value, list | tuple | range) else value


def fits(value, hint) -> bool:
    """Whether a value is of the type that a field is annotated with, finite and of 64 bits; any other hint fits all."""
    if isinstance(hint, UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        kind, *more = get_args(hint)
        return isinstance(value, tuple) and (more != [...] or all(fits(entry, kind) for entry in value))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and abs(value) < 2**63
    return not isinstance(hint, type) or isinstance(value, hint)


@dataclass(frozen=True)
class LayerwiseMethod(Method):
    """A method that enters every block alike, or only some of them: `layers` are the numbers of blocks, from 0, each
    once; None means all. ValueError for no block, the same one twice, or a number below 0."""

    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        layers = (0,) if self.layers is None else self.layers
        if not layers or len(set(layers)) < len(layers) or min(layers) < 0:
            raise ValueError(f"layers={self.layers} must name at least one block, each once, counted from 0")

    def n_blocks(self, config: TransformerConfig) -> int:
        """How many blocks of a Transformer of that shape the method enters; ValueError for one that is not there."""
        if self.layers is not None and max(self.layers) >= config.n_layers:
            raise ValueError(f"layers={self.layers} names a block that is not there: n_layers is {config.n_layers}")
        return config.n_layers if self.layers is None else len(self.layers)

    def n_norms(self, config: TransformerConfig) -> int:
        """How many norms these blocks have; where all are entered, with the embedding's and the last one."""
        outside = 0 if self.layers is not None else (config.norm == "pre") + config.embedding_norm
        return 2 * self.n_blocks(config) + outside


def uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> Tensor:
    """Draws from U(-bound, bound): the same ones whatever the default precision and device are."""
    return (torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) * bound


def normal(shape: tuple[int, ...], std: float | int, generator: Generator) -> Tensor:
    """Draws from N(0, std²): the same ones whatever the default precision and device are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * std


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a frozen module computes in, whatever is wrapped round it: the type of its innermost weights."""
    tensors = chain(unwrapped(module).parameters(), unwrapped(module).buffers())  # a quantised weight is bytes
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def parameter_like(values: Tensor, module: nn.Module, requires_grad: bool = True) -> nn.Parameter:
    """A float32 parameter on the device of `module` (float64 where the module is float64). Half precision is for the
    frozen weights only: a small step would be lost in the rounding of a 16-bit tensor."""
    device = next(module.parameters()).device
    dtype = torch.float64 if dtype_of(module) == torch.float64 else torch.float32
    return nn.Parameter(values.to(device=device, dtype=dtype), requires_grad=requires_grad)

"""What the methods on linear maps share: which maps they enter, and updates that a weight can hold.

    not merged    y = what the method computes of x           W0 in base.weight
    merged        y = W x + b                                 W in base.weight, W0 kept aside

`peft.merge` switches between the two; here is only what one linear map must know for it.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from peft.method import LayerwiseMethod, LinearMap, Wrapper, can_hold, linear_map
from peft.sites import find, in_layers, linear_shapes


@dataclass(frozen=True)
class LinearMethod(LayerwiseMethod):
    """A method that enters linear maps.

    Args:
        targets: names of linear maps, by whole parts: "query", "feedforward.up", "blocks.0.attention.query".
        layers: the numbers of the blocks to enter; None means all.

    Raises:
        ValueError: a string instead of a tuple of names; what `LayerwiseMethod` refuses.
    """

    targets: tuple[str, ...] = field(default=("query", "value"), kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.targets, str):
            raise ValueError(f'targets is a tuple of names, such as ("query", "value"), not {self.targets!r}')
        object.__setattr__(self, "targets", tuple(self.targets))  # a list would not equal what a file gives back

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """The linear maps that the targets name."""
        linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        return find(self.targets, in_layers(linears, modules, self.layers), "linear map")

    def targeted_shapes(self, config: TransformerConfig) -> list[tuple[int, int]]:
        """(d_in, d_out) of each linear map that the targets name; ValueError as in `attach`."""
        self.n_blocks(config)
        shapes = linear_shapes(config)
        if self.layers is not None:
            inside = tuple(f"blocks.{layer}." for layer in self.layers)
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(inside)}
        return [shapes[name] for name in find(self.targets, shapes, "linear map")]


class MergeableLinear(Wrapper):
    """Round a linear map: what it computes another weight, `changed_weight()`, computes as well.

    A subclass has a `forward` that gives `unchanged(x)` while the method is merged or off.
    """

    order = 0

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        self.merged = False
        self.frozen_weight: Tensor | None = None  # W0, kept aside while base.weight holds the changed weight

    def __init_subclass__(cls, **kwargs):
        answers_itself = "as_linear" in vars(cls)
        super().__init_subclass__(**kwargs)
        if "changed_weight" in vars(cls) and not answers_itself:
            cls.as_linear = MergeableLinear.as_linear  # this weight is the answer

    @abstractmethod
    def changed_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The weight that gives the same, in the precision of the method's tensors."""

    def unchanged(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """What `base` computes by the weight that it holds if the method is on, by W0 if it is off."""
        if self.merged and not self.enabled:
            return F.linear(x, self.frozen_weight, self.base.bias)
        return self.base(x)

    def unmerged_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W0, wherever it is."""
        return self.frozen_weight if self.merged else self.base.weight

    @torch.no_grad()
    def write(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        """Put the changed weight into base.weight and keep W0."""
        self.frozen_weight, self.merged = self.base.weight.clone(), True
        self.base.weight.copy_(weight)

    @torch.no_grad()
    def release(self) -> None:
        """Put W0 back, bit for bit."""
        if self.merged:
            self.base.weight.copy_(self.frozen_weight)
            self.frozen_weight, self.merged = None, False

    def as_linear(self) -> LinearMap | None:
        """Weight and bias by which the map acts in evaluation; None if a weight could not hold the change."""
        base = linear_map(self.base)
        if base is None or self.enabled == self.merged:  # it acts as `base` does: merged and on, or neither
            return base
        if type(self.base) is not nn.Linear or not can_hold(base[0], *self.tensors().values()):
            return None
        return self.changed_weight() if self.enabled else self.frozen_weight, base[1]

"""A wrapper whose change can be written into the frozen weight, and taken out again bit for bit.

    not merged    y = changed(W0 x + b, x)                    W0 in base.weight
    merged        y = W x + b                                 W in base.weight, W0 kept aside

`peft.merge` switches between the two; here is only what one linear map must know for it.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.fast.generation import LinearMap, can_hold, linear_map
from peft.method import Wrapper


class MergeableLinear(Wrapper):
    """Round a linear map: what it gives is changed on the way out, or by another weight, which comes to the same."""

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        self.frozen_weight: Tensor | None = None  # W0, kept aside while base.weight holds the changed weight

    @abstractmethod
    def changed(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """What becomes of y = W0 x + b."""

    @abstractmethod
    def changed_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The weight that gives the same, in the precision of the method's tensors."""

    @property
    def merged(self) -> bool:
        """Whether base.weight holds the changed weight at present."""
        return self.frozen_weight is not None

    def unmerged_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W0, wherever it is."""
        return self.frozen_weight if self.merged else self.base.weight

    def write(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        """Put the changed weight into base.weight and keep W0."""
        with torch.no_grad():
            self.frozen_weight = self.base.weight.clone()
            self.base.weight.copy_(weight)

    def release(self) -> None:
        """Put W0 back, bit for bit."""
        if self.merged:
            with torch.no_grad():
                self.base.weight.copy_(self.frozen_weight)
            self.frozen_weight = None

    def as_linear(self) -> LinearMap | None:
        """Weight and bias by which the map acts in evaluation; None if a weight could not hold the change."""
        base = linear_map(self.base)
        if base is None or self.enabled == self.merged:  # it acts as `base` does: merged and on, or neither
            return base
        if type(self.base) is not nn.Linear or not can_hold(base[0], *self.tensors().values()):
            return None
        return self.changed_weight() if self.enabled else self.frozen_weight, base[1]

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """What the frozen map gives, changed; unchanged where the method is disabled."""
        if self.merged and not self.enabled:
            return F.linear(x, self.frozen_weight, self.base.bias)
        y = self.base(x)
        return y if self.merged or not self.enabled else self.changed(y, x)

"""What the methods on linear layers share: which layers they enter, and updates that a weight can hold.

    not merged    y = adapted(x)                              what the method computes of x
    merged        y = W x + b                                 W = changed_weight(), computed once by `peft.merge`

`base.weight` is W0 at all times: W stands beside it and is no part of the state dict, and `peft.unmerge` forgets it.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from minitransformer.fast.stand_in import may_stand_in
from peft.method import LayerwiseMethod, LinearMap, Wrapper, can_hold, linear_map
from peft.methods.options import Names
from peft.sites import find, in_layers, linear_shapes


@dataclass(frozen=True)
class LinearMethod(LayerwiseMethod):
    """A method that enters linear layers.

    Args:
        targets: names of linear layers, by whole parts, each once: "query", "attention.query", "feedforward.up".
        layers: the numbers of the blocks to enter; None means all.
    """

    targets: Names = field(default=("query", "value"), kw_only=True)

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """The linear layers that the targets name."""
        linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        return find(self.targets, in_layers(linears, modules, self.layers), "linear layer")

    def targeted_shapes(self, config: TransformerConfig) -> list[tuple[int, int]]:
        """(d_in, d_out) of each linear layer that the targets name; ValueError as in `attach`."""
        self.n_blocks(config)  # refuses a block that is not there
        shapes, blocks = linear_shapes(config), tuple(f"blocks.{layer}." for layer in self.layers or ())
        names = [name for name in shapes if self.layers is None or name.startswith(blocks)]
        return [shapes[name] for name in find(self.targets, names, "linear layer")]


class MergeableLinear(Wrapper):
    """Round a linear layer: another weight, `changed_weight()`, computes the same as the wrapper.

    A subclass has `changed_weight` and `adapted(x)`, what it computes of x by W0 and its own tensors. One that changes
    `adapted` or `forward` alone does not inherit the weight, and cannot be merged.
    """

    order = 0
    merged_weight: Tensor | None = None  # W [d_out, d_in] while merged; `made_of`: the versions of what it comes from

    def __init_subclass__(cls, **kwargs):
        own = {*vars(cls)}
        super().__init_subclass__(**kwargs)
        if "changed_weight" not in own and own & {"adapted", "forward"}:
            cls.changed_weight = MergeableLinear.changed_weight
        if "changed_weight" in own and "as_linear" not in own:
            cls.as_linear = MergeableLinear.as_linear  # this weight is the answer

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """`base(x)` while the method is off; W x + b if it is merged and nobody could tell; else `adapted(x)`.

        While it is merged, a backward pass to a tensor that learns raises ValueError: W would not follow it.
        """
        if not self.enabled:
            return self.base(x)
        if self.merged_weight is None:
            return self.adapted(x)
        tensors = self.sources()
        by_weight = self.is_replaceable(x) and versions(tensors) == self.made_of
        y = F.linear(x, self.merged_weight, self.base.bias) if by_weight else self.adapted(x)
        return untrained(y, tensors) if torch.is_grad_enabled() else y

    def changed_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The weight that gives the same, in the precision of the method's tensors; ValueError if there is none."""
        raise ValueError(f"a {type(self).__name__} has no changed_weight that computes the same; use it unmerged")

    @property
    def merged(self) -> bool:
        """Whether there is a W, which is used wherever nobody could tell."""
        return self.merged_weight is not None

    @torch.inference_mode(False)
    @torch.no_grad()
    def weight_to_merge(self) -> Float[Tensor, "d_out d_in"]:
        """`changed_weight()` in the precision of W0."""
        return self.changed_weight().detach().to(self.base.weight.dtype)

    def merge(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        """Let this weight stand for W0 and the update, as long as the tensors stay as they are."""
        self.merged_weight, self.made_of = weight, versions(self.sources())

    def sources(self) -> list[Tensor]:
        """The tensors that W is computed of, and the bias."""
        return [t for part in (self, self.base) for t in part._parameters.values() if t is not None]

    def _apply(self, *args, **kwargs) -> "MergeableLinear":  # what `to`, `double` and the like call
        super()._apply(*args, **kwargs)
        if self.merged:
            self.merge(self.weight_to_merge())
        return self

    def is_replaceable(self, x: Tensor) -> bool:
        """Whether another weight may stand in for that of `base`, on the way from x, so that nobody could tell."""
        base = self.base
        return type(base) is nn.Linear and may_stand_in(x, base)

    def as_linear(self) -> LinearMap | None:
        """Weight and bias by which the layer acts in evaluation; None if a weight could not hold the change."""
        if not self.enabled:
            return linear_map(self.base)
        if type(self.base) is not nn.Linear or type(self).changed_weight is MergeableLinear.changed_weight:
            return None
        if self.merged and versions(self.sources()) == self.made_of:
            return self.merged_weight, self.base.bias
        is_exact = can_hold(self.base.weight, *self.tensors().values())
        return (self.changed_weight(), self.base.bias) if is_exact else None

    def extra_repr(self) -> str:
        return super().extra_repr() + ", merged" * self.merged


def versions(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Where each tensor lies, and its version, which a change in place counts up."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def untrained(y: Tensor, tensors: list[Tensor]) -> Tensor:
    """y, such that a gradient of those of the tensors that learn is refused."""
    learning = [t.flatten()[:0].sum() for t in tensors if isinstance(t, nn.Parameter) and t.requires_grad]
    if not learning:
        return y
    nothing = sum(learning)  # 0, whatever they hold
    nothing.register_hook(_refuse)
    return y + nothing


def _refuse(gradient: Tensor) -> None:
    raise ValueError("what is merged cannot be trained; unmerge(model) first, or train merged_copy(model)")

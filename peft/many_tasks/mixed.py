"""The wrappers of a mixed batch: the stacked tensors of many tasks at one place, of which each row takes its own.

See `task_bank.py` for the idea and the shapes. Which row is under which task belongs to the pass
(`minitransformer/call.py`): `TaskBank.using` tells each wrapper where in its stacks every row finds its tensors.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention, Context, Mask
from minitransformer.call import CALL
from minitransformer.feedforward import activate
from peft.method import KeysAndValues, Wrapper, keys_and_values, unwrapped
from peft.methods.adapter import Joined
from peft.methods.prefix import PrefixContext


class MixedWrapper(Wrapper):
    """Stacks of tensors, [K + 1, …] each, for the K tasks that enter at this place, and zeros for rows under no such.

    Args:
        base: the frozen module.
        own: the wrapper of each such task, by the task's name.
    """

    enabled = True  # row by row: the zeros change nothing

    def __init__(self, base: nn.Module, own: dict[str, Wrapper]):
        super().__init__(base)
        first = next(iter(own.values()))
        self.order, self.training, self.fixed = first.order, first.training, first.frozen_tensors()
        self.shapes = {task: {name: t.shape for name, t in w.tensors().items()} for task, w in own.items()}
        for name in first.tensors():
            self.register_parameter(name, nn.Parameter(stacked([w.tensors()[name].detach() for w in own.values()])))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors().items())

    def frozen_tensors(self) -> set[str]:
        """Those that the tasks' recipes keep fixed."""
        return self.fixed

    def keep(self, name: str, values: list[float]) -> None:
        """Note a number of each task's recipe, [K + 1]; it is 0 where there is no task."""
        like = next(iter(self.tensors().values()))
        self.register_buffer(name, like.new_tensor([*values, 0.0]), persistent=False)

    def places(self, tasks: Sequence[str | None]) -> Int[Tensor, "B"]:
        """For rows under these tasks, where in the stacks each finds its tensors."""
        numbers = {task: number for number, task in enumerate(self.shapes)}
        device = next(iter(self.tensors().values())).device
        return torch.tensor([numbers.get(task, len(numbers)) for task in tasks], dtype=torch.long, device=device)

    def chosen(self, x: Float[Tensor, "B *rest"]) -> Int[Tensor, "B"]:
        """The places of the rows of this pass.

        Raises:
            ValueError: the batch has another number of rows, or nobody said which row is under which task.
        """
        place = CALL.told.get(id(self))
        if place is None:
            raise ValueError("say which task each row is under: bank(tokens, tasks=[…]) or with bank.using([…])")
        if len(place) != len(x):
            raise ValueError(f"{len(place)} tasks are named for {len(x)} rows; name one for each")
        return place

    def tensors_of(self, task: str) -> dict[str, Tensor]:
        """A copy of the tensors of one task, without what fills them up; nothing if it does not enter here."""
        if task not in self.shapes:
            return {}
        stacks = {name: tensor.detach()[list(self.shapes).index(task)] for name, tensor in self.tensors().items()}
        return {name: stacks[name][tuple(map(slice, shape))].clone() for name, shape in self.shapes[task].items()}


def stacked(tensors: list[Tensor]) -> Tensor:
    """The tensors in one, each filled up with zeros to the size of the largest, and one of zeros behind them."""
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(tensors[0].ndim)]
    out = tensors[0].new_zeros(len(tensors) + 1, *sizes)
    for row, tensor in zip(out[:-1], tensors, strict=True):
        row[tuple(map(slice, tensor.shape))] = tensor
    return out


class MixedLoRA(MixedWrapper):
    """y_b + s B A x_b with the A [K, r, d_in] and B [K, d_out, r] of each row's task. Hu et al. 2022, equation 3."""

    def __init__(self, base: nn.Linear, own: dict[str, Wrapper]):
        super().__init__(base, own)
        self.keep("scale", [wrapper.scale for wrapper in own.values()])
        self.keep("dropout", [wrapper.recipe.dropout for wrapper in own.values()])
        self.drops = any(wrapper.recipe.dropout for wrapper in own.values())

    def forward(self, x: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B T d_out"]:
        """The frozen map for all rows at once, the updates by two batched products."""
        y, place = self.base(x), self.chosen(x)
        read = self.dropped(x.to(self.A.dtype), self.dropout[place]) @ self.A[place].mT  # [B, T, r]
        scaled = self.scale[place][:, None, None] * read  # here, where it is thin
        return torch.baddbmm(y.to(read.dtype), scaled, self.B[place].mT).to(y.dtype)

    def dropped(self, x: Float[Tensor, "B T d_in"], p: Float[Tensor, "B"]) -> Float[Tensor, "B T d_in"]:
        """Dropout with a probability for each row, in training only."""
        if not (self.training and self.drops):
            return x
        p = p[:, None, None]
        return x * (torch.rand_like(x) >= p) / (1 - p)


class MixedPrefix(MixedWrapper):
    """Attention of each row over the prefix of its task, of `key` and `value` [K, n, d_model] or `hidden` [K, n, d]."""

    def __init__(self, base: Attention, own: dict[str, Wrapper]):
        super().__init__(base, own)
        lengths = [len(tensor) for wrapper in own.values() for tensor in [*wrapper.tensors().values()][:1]]
        there = torch.arange(max(lengths)) < torch.tensor([*lengths, 0])[:, None]  # [K + 1, n]
        self.register_buffer("there", there.to(next(iter(self.tensors().values())).device), persistent=False)

    def forward(
        self, x: Float[Tensor, "B T d_model"], mask: Mask = None, context: Context | None = None
    ) -> Float[Tensor, "B T d_model"]:
        """The frozen layer, with each row's own prefix as its context."""
        place, frozen = self.chosen(x), unwrapped(self.base)
        if hasattr(self, "hidden"):
            hidden = self.hidden[place].to(x.dtype)  # only of tasks that are in the batch
            key, value = frozen.key(hidden), frozen.value(hidden)  # [B, n, d_model], each row through its own LoRA
        else:
            key, value = self.key[place], self.value[place]
        key, value = frozen.split_heads(key), frozen.split_heads(value)
        return self.base(x, mask, PrefixContext(key, value, context, visible=self.there[place]))

    def keys_and_values(self, x: Float[Tensor, "B S d_model"]) -> KeysAndValues | None:
        """The frozen layer's."""
        return keys_and_values(self.base, x)


class MixedAdapter(MixedWrapper, Joined):
    """h_b + s bottleneck(h_b) with each row's own `down_…` and `up_…`. Houlsby et al. 2019, section 2.1."""

    def __init__(self, base: nn.Module, own: dict[str, Wrapper]):
        super().__init__(base, own)
        first = next(iter(own.values()))
        self.joined, self.activation = first.joined, first.recipe.activation
        self.keep("scale", [wrapper.recipe.scale for wrapper in own.values()])

    def added(self, h: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """What each row's adapter adds."""
        place = self.chosen(h)
        inner = torch.baddbmm(self.down_bias[place][:, None], h.to(self.down_bias.dtype), self.down_weight[place].mT)
        out = torch.baddbmm(self.up_bias[place][:, None], activate(inner, self.activation), self.up_weight[place].mT)
        return (self.scale[place][:, None, None] * out).to(h.dtype)

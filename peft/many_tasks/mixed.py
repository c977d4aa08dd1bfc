"""The wrappers of a mixed batch: the stacked tensors of many tasks at one place, of which each row takes its own.

See `task_bank.py` for the idea and the shapes. `Rows` says which task each row of the batch is under; all
wrappers of a bank share it.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention, Context, Mask
from minitransformer.feedforward import activate
from peft.method import KeysAndValues, Wrapper, keys_and_values, unwrapped
from peft.methods.adapter import Joined
from peft.methods.prefix import PrefixContext


class Rows:
    """The number of the task of each row, [B]; as many as there are tasks stands for none."""

    def __init__(self):
        self.numbers: Tensor | None = None


class MixedWrapper(Wrapper):
    """Stacks of tensors, [K, …] each, for the K tasks that enter at this place.

    Args:
        base: the frozen module.
        own: the wrapper of each such task, by the task's number.
        n_tasks: how many tasks the bank has.
        rows: shared by all wrappers of the bank.
    """

    order = 0

    def __init__(self, base: nn.Module, own: dict[int, Wrapper], n_tasks: int, rows: Rows):
        super().__init__(base)
        self.rows = rows
        self.shapes = {number: {name: t.shape for name, t in w.tensors().items()} for number, w in own.items()}
        place = torch.full((n_tasks + 1,), -1)
        for index, number in enumerate(own):
            place[number] = index
        self.register_buffer("place", place, persistent=False)
        for name in next(iter(own.values())).tensors():
            self.register_parameter(name, nn.Parameter(stacked([w.tensors()[name].detach() for w in own.values()])))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors().items())

    def chosen(self, x: Float[Tensor, "B *rest"]) -> tuple[Int[Tensor, "B"], Bool[Tensor, "B"]]:
        """For each row its place in the stacks (0 where it has none), and whether it has one.

        Raises:
            ValueError: the batch has another number of rows, or nobody said which row is under which task.
        """
        if self.rows.numbers is None:
            raise ValueError("say which task each row is under: bank(tokens, tasks=[…]) or with bank.using([…])")
        if len(self.rows.numbers) != len(x):
            raise ValueError(f"{len(self.rows.numbers)} tasks are named for {len(x)} rows; name one for each")
        place = self.place[self.rows.numbers.to(self.place.device)]
        return place.clamp(min=0), place >= 0

    def tensors_of(self, number: int) -> dict[str, Tensor]:
        """A copy of the tensors of one task, without what fills them up; nothing if it does not enter here."""
        index = int(self.place[number])
        if index < 0:
            return {}
        stacks = {name: tensor.detach()[index] for name, tensor in self.tensors().items()}
        return {name: stacks[name][tuple(map(slice, shape))].clone() for name, shape in self.shapes[number].items()}


def stacked(tensors: list[Tensor]) -> Tensor:
    """The tensors in one, each filled up with zeros to the size of the largest."""
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(tensors[0].ndim)]
    out = tensors[0].new_zeros(len(tensors), *sizes)
    for row, tensor in zip(out, tensors, strict=True):
        row[tuple(map(slice, tensor.shape))] = tensor
    return out


class MixedLoRA(MixedWrapper):
    """y_b + s B A x_b with the A [K, r, d_in] and B [K, d_out, r] of each row's task. Hu et al. 2022, equation 3."""

    position_wise = True

    def __init__(self, base: nn.Linear, own: dict[int, Wrapper], n_tasks: int, rows: Rows):
        super().__init__(base, own, n_tasks, rows)
        for name in ("scale", "dropout"):
            values = [getattr(wrapper.recipe, name) for wrapper in own.values()]
            self.register_buffer(name, self.A.new_tensor(values), persistent=False)

    def forward(self, x: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B T d_out"]:
        """The frozen map for all rows at once, the updates by two batched products."""
        y = self.base(x)
        place, has_one = self.chosen(x)
        read = self.dropped(x.to(self.A.dtype), self.dropout[place]) @ self.A[place].mT  # [B, T, r]
        scaled = (self.scale[place] * has_one)[:, None, None] * read  # here, where it is thin
        return torch.baddbmm(y.to(read.dtype), scaled, self.B[place].mT).to(y.dtype)

    def dropped(self, x: Float[Tensor, "B T d_in"], p: Float[Tensor, "B"]) -> Float[Tensor, "B T d_in"]:
        """Dropout with a probability for each row, in training only."""
        if not self.training or not bool(self.dropout.any()):
            return x
        p = p[:, None, None]
        return x * (torch.rand_like(x) >= p) / (1 - p)


class MixedPrefix(MixedWrapper):
    """Attention of each row over the prefix of its task, of `key` and `value` [K, n, d_model] or `hidden` [K, n, d]."""

    position_wise = True

    def __init__(self, base: Attention, own: dict[int, Wrapper], n_tasks: int, rows: Rows):
        super().__init__(base, own, n_tasks, rows)
        lengths = torch.tensor([wrapper.recipe.length for wrapper in own.values()])
        there = torch.arange(int(lengths.max())) < lengths[:, None]  # [K, n]
        self.register_buffer("there", there, persistent=False)

    def forward(
        self, x: Float[Tensor, "B T d_model"], mask: Mask = None, context: Context | None = None
    ) -> Float[Tensor, "B T d_model"]:
        """The frozen layer, with each row's own prefix as its context."""
        place, has_one = self.chosen(x)
        frozen = unwrapped(self.base)
        if hasattr(self, "hidden"):
            hidden = self.hidden[place]  # only of tasks that are in the batch
            key, value = (unwrapped(part)(hidden) for part in (frozen.key, frozen.value))  # [B, n, d_model]
        else:
            key, value = self.key[place], self.value[place]
        heads = (frozen.split_heads(part) for part in (key, value))
        visible = self.there[place] & has_one[:, None]  # [B, n]
        return self.base(x, mask, PrefixContext(*heads, context, visible=visible))

    def keys_and_values(self, x: Float[Tensor, "B S d_model"]) -> KeysAndValues | None:
        """The frozen layer's."""
        return keys_and_values(self.base, x)


class MixedAdapter(MixedWrapper, Joined):
    """h_b + s bottleneck(h_b) with each row's own `down_…` and `up_…`. Houlsby et al. 2019, section 2.1."""

    order = Joined.order
    position_wise = True

    def __init__(self, base: nn.Module, own: dict[int, Wrapper], n_tasks: int, rows: Rows):
        super().__init__(base, own, n_tasks, rows)
        first = next(iter(own.values()))
        self.joined, self.activation = first.joined, first.recipe.activation
        scales = [wrapper.recipe.scale for wrapper in own.values()]
        self.register_buffer("scale", self.up_bias.new_tensor(scales), persistent=False)

    def added(self, h: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """What each row's adapter adds."""
        place, has_one = self.chosen(h)
        inner = torch.baddbmm(self.down_bias[place][:, None], h.to(self.down_bias.dtype), self.down_weight[place].mT)
        out = torch.baddbmm(self.up_bias[place][:, None], activate(inner, self.activation), self.up_weight[place].mT)
        return ((self.scale[place] * has_one)[:, None, None] * out).to(h.dtype)

"""The wrappers of a mixed batch: the stacked tensors of many tasks at one place, of which each row takes its own.

See `task_bank.py` for the idea and the shapes. Which row is under which task belongs to the pass
(`minitransformer/call.py`): `TaskBank.using` tells each wrapper where in its stacks every row finds its tensors.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from minitransformer.attention import Attention, Context, Mask
from minitransformer.call import CALL
from minitransformer.feedforward import activate
from peft.method import Wrapper, unwrapped
from peft.methods.adapter import Joined
from peft.methods.prefix import PrefixContext


def rows_under(
    tasks: Sequence[str | None], own: Sequence[str], device: torch.device
) -> tuple[Int[Tensor, "B"], Bool[Tensor, "B"], bool]:
    """Where rows under these tasks find their tensors in the stacks of the tasks `own`; which of them find none; and
    whether any finds none."""
    absent = [task not in own for task in tasks]
    place = [0 if missing else own.index(task) for task, missing in zip(tasks, absent, strict=True)]
    return torch.tensor(place, device=device), torch.tensor(absent, device=device), any(absent)


class MixedWrapper(Wrapper):
    """Stacks of tensors, [K, …] each, for the K tasks that enter at this place.

    Args:
        base: the frozen module.
        own: the wrapper of each such task, by the task's name.
        trainable: whether the tensors are trained, but for those that the tasks' recipes keep fixed.
    """

    enabled = True  # row by row: the zeros change nothing

    def __init__(self, base: nn.Module, own: dict[str, Wrapper], trainable: bool):
        super().__init__(base)
        first = next(iter(own.values()))
        self.tasks, self.order, self.training = tuple(own), first.order, first.training
        self.shapes = {task: {name: t.shape for name, t in w.tensors().items()} for task, w in own.items()}
        for name in first.tensors():
            stack = stacked([wrapper.tensors()[name].detach() for wrapper in own.values()])
            self.register_parameter(name, nn.Parameter(stack, trainable and name not in first.frozen_tensors()))
        for option in ("scale", "dropout"):  # of each recipe, [K, 1, 1]; None where no recipe has it
            values = stack.new_tensor([getattr(wrapper.recipe, option, 0) for wrapper in own.values()])[:, None, None]
            self.register_buffer(option, values if values.any() else None, persistent=False)

    def chosen(self, x: Float[Tensor, "B *rest"], *stacks: Shaped[Tensor, "K ..."]) -> list[Shaped[Tensor, "B ..."]]:
        """Of each stack what each row of x takes; zeros, which change nothing, if its task does not enter here.

        Raises:
            ValueError: the batch has another number of rows, or nobody said which row is under which task.
        """
        rows = CALL.told.get(id(self))
        if rows is None:
            raise ValueError("say which task each row is under: bank(tokens, tasks=[…]) or with bank.using([…])")
        place, absent = rows[:2]
        if len(place) != len(x):
            raise ValueError(f"{len(place)} tasks are named for {len(x)} rows; name one for each")
        own = [stack.index_select(0, place) for stack in stacks]
        if torch.compiler.is_compiling() or rows[2]:  # one graph serves whatever tasks
            # Filled in, not multiplied by 0: a task that diverged must reach no other row, nor its gradient.
            own = [tensor.masked_fill(absent.view(-1, *[1] * (tensor.ndim - 1)), 0) for tensor in own]
        return own


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

    def forward(self, x: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B T d_out"]:
        """The frozen map for all rows at once, the updates by two batched products."""
        y = self.base(x)
        A, B, scale = self.chosen(x, self.A, self.B, self.scale)
        read = self.dropped(x.to(A.dtype)) @ A.mT  # [B, T, r]
        return torch.baddbmm(y.to(read.dtype), scale * read, B.mT).to(y.dtype)  # scaled here, where it is thin

    def dropped(self, x: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B T d_in"]:
        """Dropout with a probability for each row, in training only."""
        if not self.training or self.dropout is None:
            return x
        p = self.chosen(x, self.dropout)[0]
        return x * (torch.rand_like(x) >= p) / (1 - p)


class MixedPrefix(MixedWrapper):
    """Attention of each row over the prefix of its task, of `key` and `value` [K, n, d_kv] or `hidden` [K, n, d]."""

    position_wise = True

    def __init__(self, base: Attention, own: dict[str, Wrapper], trainable: bool):
        super().__init__(base, own, trainable)
        there = [torch.ones_like(next(iter(w.tensors().values()))[:, 0], dtype=torch.bool) for w in own.values()]
        self.register_buffer("there", stacked(there), persistent=False)  # [K, n]

    def forward(
        self, x: Float[Tensor, "B T d_model"], mask: Mask = None, context: Context | None = None
    ) -> Float[Tensor, "B T d_model"]:
        """The frozen layer, with each row's own prefix as its context."""
        frozen = unwrapped(self.base)
        visible, *prefix = self.chosen(x, self.there, *self._parameters.values())
        if hasattr(self, "hidden"):  # each row's goes through its own LoRA
            prefix = [part(prefix[0].to(x.dtype)) for part in (frozen.key, frozen.value)]
        key, value = (frozen.split_heads(part) for part in prefix)  # [B, H, n, d_head]
        return self.base(x, mask, PrefixContext(key, value, context, visible=visible))


class MixedAdapter(MixedWrapper, Joined):
    """h_b + s bottleneck(h_b) with each row's own `down_…` and `up_…`. Houlsby et al. 2019, section 2.1."""

    position_wise = True

    def __init__(self, base: nn.Module, own: dict[str, Wrapper], trainable: bool):
        super().__init__(base, own, trainable)
        first = next(iter(own.values()))
        self.joined, self.activation = first.joined, first.recipe.activation

    def added(self, h: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """What each row's adapter adds."""
        scale, down_weight, down_bias, up_weight, up_bias = self.chosen(h, self.scale, *self._parameters.values())
        inner = torch.baddbmm(down_bias[:, None], h.to(down_bias.dtype), down_weight.mT)
        out = torch.baddbmm(up_bias[:, None], activate(inner, self.activation), up_weight.mT)
        return (scale * out).to(h.dtype)

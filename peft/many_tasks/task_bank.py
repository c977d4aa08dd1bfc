"""Many tasks in one batch: each row under a method of its own, of whatever family, or under none.

    bank = TaskBank(model, {"mood": "mood.safetensors", "places": prefix_model, "both": [(LoRA(rank=4), tensors)]})
    logits = bank(tokens, padding_mask, tasks=["mood", None, "places", "mood"])

A server keeps one frozen backbone and a small file for each task. Requests for different tasks arrive together; to run
them one task after the other wastes the hardware. So the tensors of all tasks are stacked, K of them, each row takes
its own by its number, and one batched product serves all rows:

    LoRA       y_b + s[k_b] B[k_b] (A[k_b] x_b)               A [K, r, d_in], B [K, d_out, r]
    prefix     attention of row b over [P_k[k_b] ; K_b]       P_k, P_v [K, n, d_model]
    adapter    h_b + s[k_b] bottleneck(h_b; k_b)              down [K, m, d], up [K, d, m]

The cost grows with the tokens, not with K. Ranks, lengths and widths may differ: shorter ones are filled up with zeros
(prefixes: hidden by a mask), which add nothing and get a gradient of exactly zero, so that they stay zero in training.

Source: the batched gather of Chen et al. 2024 ("Punica") and Sheng et al. 2024 ("S-LoRA"), in plain PyTorch. Differs
from the papers: no kernel of its own, and not only LoRA.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.transformer import Transformer
from peft.attach import attach, attached, detach, freeze, load_state_dict, thaw
from peft.checkpoint import load
from peft.many_tasks.mixed import MixedAdapter, MixedLoRA, MixedPrefix, MixedWrapper, Rows
from peft.method import Method
from peft.methods.adapter import Adapter
from peft.methods.lora import LoRA, LoRALinear
from peft.methods.prefix import PrefixAttention
from peft.sites import all_wrappers, merged_wrappers, sites_of, unwrap, wrap

Bundle = Sequence[tuple[Method, Mapping[str, Tensor]]]  # recipes, each with its `state_dict`
Source = str | Path | nn.Module | Bundle
Entered = list[tuple[tuple, nn.Module]]  # the wrappers of one task: each with its place and its kind


class TaskBank(nn.Module):
    """A frozen Transformer with the tensors of many tasks, chosen row by row.

    Args:
        model: nothing may be attached to it; it is changed in place, until `detach`.
        sources: for each task by name: a file that `save` wrote, a model with methods attached, or a list of recipes
            with their tensors.
        trainable: whether the tensors are trained; the model never is.

    Raises:
        ValueError: methods on the model, no task, a merged source, or a method that cannot share a batch. The model
            is as it was then.
    """

    def __init__(self, model: Transformer, sources: Mapping[str, Source], trainable: bool = False):
        super().__init__()
        if attached(model):
            raise ValueError("methods are attached to the model; detach(model) first, and give them as a source")
        if not sources:
            raise ValueError('no task is given; give some by name, such as {"mood": "mood.safetensors"}')
        collected = {name: _wrappers_of(model, name, source) for name, source in sources.items()}
        self.model, self.names, self.rows = model, tuple(sources), Rows()
        freeze(model)
        sites = sites_of(model)
        for name, mixed in self._mixed(collected, {name: site.module for name, site in sites.items()}):
            for tensor in mixed.tensors().values():
                tensor.requires_grad_(trainable)
            wrap(sites[name], mixed)

    def _mixed(
        self, collected: dict[str, Entered], modules: dict[str, nn.Module]
    ) -> Iterator[tuple[str, MixedWrapper]]:
        """One wrapper for each place and kind, with the tensors of all tasks that enter there."""
        places: dict[tuple, dict[int, nn.Module]] = {}
        for number, name in enumerate(self.names):
            for place, wrapper in collected[name]:
                places.setdefault(place, {})[number] = wrapper
        for (site, mixed, *_), own in places.items():
            yield site, mixed(modules[site], own, len(self.names), self.rows)

    def extra_repr(self) -> str:
        return f"tasks: {', '.join(self.names)}"

    @contextmanager
    def using(self, tasks: Sequence[str | None]) -> Iterator[nn.Module]:
        """Inside, row b of every batch of `model` runs under `tasks[b]`; None is the frozen model alone.

        Raises:
            ValueError: a name that is no task of this bank.
        """
        unknown = sorted({str(task) for task in tasks if task is not None and task not in self.names})
        if unknown:
            raise ValueError(f"there is no task {', '.join(unknown)}; there are {', '.join(self.names)}, and None")
        numbers = [len(self.names) if task is None else self.names.index(task) for task in tasks]
        before, self.rows.numbers = self.rows.numbers, torch.tensor(numbers, dtype=torch.long)
        try:
            yield self.model
        finally:
            self.rows.numbers = before

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        padding_mask: Bool[Tensor, "B T"] | None = None,
        *,
        tasks: Sequence[str | None],
    ) -> Float[Tensor, "B T V"]:
        """The logits, each row under its task.

        Raises:
            ValueError: an unknown name, or not one name for each row.
        """
        self._require_one_for_each(tokens, tasks)
        with self.using(tasks):
            return self.model(tokens, padding_mask)

    def generate(self, tokens: Int[Tensor, "B T"], *rest, tasks: Sequence[str | None], **options) -> Tensor:
        """As `Transformer.generate`, each row under its task."""
        self._require_one_for_each(tokens, tasks)
        with self.using(tasks):
            return self.model.generate(tokens, *rest, **options)

    def tensors(self, task: str) -> dict[str, Tensor]:
        """A copy of one task's tensors as they are now, by the names of `peft.state_dict`."""
        if task not in self.names:
            raise ValueError(f"there is no task {task}; there are {', '.join(self.names)}")
        found = {}
        for site, wrappers in all_wrappers(self.model).items():
            for wrapper in wrappers:
                own = wrapper.tensors_of(self.names.index(task))
                found.update({f"{site}.{name}": tensor for name, tensor in own.items()})
        return found

    def detach(self) -> Transformer:
        """Take everything out again: the model with the very same modules as before."""
        for site in sites_of(self.model).values():
            if site.wrappers:
                unwrap(site)
        thaw(self.model)
        return self.model

    @staticmethod
    def _require_one_for_each(tokens: Int[Tensor, "B T"], tasks: Sequence[str | None]) -> None:
        if isinstance(tasks, str) or len(tasks) != len(tokens):
            raise ValueError(f"give a list with one task for each of the {len(tokens)} rows (or None), got {tasks!r}")


def _wrappers_of(model: Transformer, name: str, source: Source) -> Entered:
    """The wrappers of one task: those of an attached model, or made for the moment on `model` itself."""
    if isinstance(source, nn.Module):
        return _checked(name, source)
    try:
        if isinstance(source, str | Path):
            load(model, source)
        else:
            for recipe, _ in source:
                attach(model, recipe)
            load_state_dict(model, {key: tensor for _, tensors in source for key, tensor in tensors.items()})
        return _checked(name, model)
    finally:
        if attached(model):
            detach(model)


def _checked(name: str, model: nn.Module) -> Entered:
    if not attached(model):
        raise ValueError(f"the source of {name} has no method attached")
    if merged_wrappers(model):
        raise ValueError(f"the source of {name} is merged into its weights; unmerge it first")
    if any(record.train_also for record in attached(model)):
        raise ValueError(f"{name} trains whole modules beside its method (train_also), which rows cannot share")
    return [((site, *_kind(own)), own) for site, wrappers in all_wrappers(model).items() for own in wrappers]


def _kind(wrapper: nn.Module) -> tuple:
    """What serves such a wrapper in a mixed batch, and what all that share one have to have in common."""
    if isinstance(wrapper, LoRALinear) and type(wrapper.recipe) is LoRA:
        return (MixedLoRA,)
    if isinstance(wrapper, PrefixAttention) and not (wrapper.recipe.gated or wrapper.recipe.reparameterize):
        return (MixedPrefix, wrapper.recipe.at)
    if isinstance(wrapper, Adapter):
        return (MixedAdapter, wrapper.joined, wrapper.recipe.activation)
    what = getattr(wrapper, "recipe", type(wrapper).__name__)
    raise ValueError(f"{what} cannot share a batch with other tasks; LoRA, adapters and plain prefixes can")

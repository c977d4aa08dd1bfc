"""Many tasks in one batch: each row under a method of its own, of whatever family, or under none.

    bank = TaskBank(model, {"mood": "mood.safetensors", "places": prefix_model, "both": [(LoRA(rank=4), tensors)]})
    logits = bank(tokens, padding_mask, tasks=["mood", None, "places", "mood"])

A server keeps one frozen backbone and a small file for each task. Requests for different tasks arrive together; to run
them one task after the other wastes the hardware. So the tensors of all tasks are stacked, K of them, each row takes
its own by its number, and one batched product serves all rows:

    LoRA       y_b + s[k_b] B[k_b] (A[k_b] x_b)               A [K, r, d_in], B [K, d_out, r]
    prefix     attention of row b over [P_k[k_b] ; K_b]       P_k, P_v [K, n, d_kv]
    adapter    h_b + s[k_b] bottleneck(h_b; k_b)              down [K, m, d], up [K, d, m]

The cost grows with the tokens, not with K. Ranks, lengths and widths may differ: shorter ones are filled up with zeros
(prefixes: hidden by a mask), which add nothing and get a gradient of exactly zero, so that they stay zero in training.

Source: the batched gather of Chen et al. 2024 ("Punica") and Sheng et al. 2024 ("S-LoRA"), in plain PyTorch. Differs
from the papers: no kernel of its own, and not only LoRA.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.call import telling
from minitransformer.transformer import Transformer
from peft.attach import attach, attached, detach, freeze, load_state_dict, restore
from peft.checkpoint import base_hash, load
from peft.many_tasks.mixed import MixedAdapter, MixedLoRA, MixedPrefix, rows_under
from peft.merging.combine import Source, held
from peft.method import Wrapper
from peft.methods.adapter import Adapter
from peft.methods.lora import LoRALinear
from peft.methods.prefix import PrefixAttention
from peft.sites import all_wrappers, arrange, block_names, layer_of, named_sites, sites_of

Tasks = Sequence[str | None]  # for each row its task; None is the frozen model alone


class TaskBank(nn.Module):
    """A frozen Transformer with the tensors of many tasks, chosen row by row.

    Args:
        model: nothing may be attached to it; it is changed in place, until `detach`.
        sources: for each task by name: a file that `save` wrote, a model with methods attached, or a list of recipes
            with their tensors. Each must be of this very base, or (a list, which does not say) fit it.
        trainable: whether the tensors are trained, but for those that a recipe keeps fixed; the model never is.

    Raises:
        ValueError: methods or another bank on the model, no task, a source of another base or damaged, or a method that
            cannot share a batch. The model is as it was then.
    """

    def __init__(self, model: Transformer, sources: Mapping[str, Source], trainable: bool = False):
        super().__init__()
        if all_wrappers(model):
            raise ValueError("the model carries methods, or a bank; detach(model) first, and give them as a source")
        if not sources or not all(isinstance(task, str) for task in sources):
            raise ValueError(f'give tasks by name, such as {{"mood": "mood.safetensors"}}; got {list(sources)}')
        places: dict[tuple, dict[str, Wrapper]] = {}
        for task, source in sorted(sources.items()):  # so a state dict fits whatever the order
            for place, wrapper in _wrappers_of(model, task, source).items():
                places.setdefault(place, {})[task] = wrapper
        sites = sites_of(model)
        mixed = [(site, kind(sites[site].module, own, trainable)) for (site, kind, *_), own in places.items()]
        self.model, self.names, self.mixed, self.training = model, tuple(sources), mixed, model.training
        freeze(sites)  # all is made: from here on nothing can fail
        for site, wrapper in mixed:
            arrange(sites[site], [*sites[site].wrappers, wrapper])

    @contextmanager
    def using(self, tasks: Tasks) -> Iterator[nn.Module]:
        """Inside, in this thread, row b of every batch of `model` runs under `tasks[b]`.

        Raises:
            ValueError: a name that is no task of this bank, or the bank is detached.
        """
        tasks = [tasks] if isinstance(tasks, str) else tasks  # one row
        self._check(tasks)
        device, places = next(self.parameters()).device, {wrapper.tasks for _, wrapper in self.mixed}
        rows = {own: rows_under(tasks, own, device) for own in places}
        with telling({id(wrapper): rows[wrapper.tasks] for _, wrapper in self.mixed}):
            yield self.model

    def forward(self, tokens: Int[Tensor, "B T"], *rest, tasks: Tasks, **options) -> Float[Tensor, "B T V"]:
        """As `Transformer.forward`, each row under its task; ValueError as in `using`, or not one name for each row."""
        with self.using(tasks):
            return self.model(tokens, *rest, **options)

    def generate(self, tokens: Int[Tensor, "B T"], *rest, tasks: Tasks, **options) -> Int[Tensor, "B more"]:
        """As `Transformer.generate`, each row under its task; errors as in `forward`."""
        with self.using(tasks):
            return self.model.generate(tokens, *rest, **options)

    def tensors(self, task: str) -> dict[str, Tensor]:
        """A copy of one task's tensors as they are now, by the names of `peft.state_dict`."""
        self._check([task])
        found = {}
        for site, wrapper in self.mixed:
            for name, shape in wrapper.shapes.get(task, {}).items():
                stack = wrapper.tensors()[name].detach()[wrapper.tasks.index(task)]
                found[f"{site}.{name}"] = stack[tuple(map(slice, shape))].clone()  # without what fills it up
        return found

    def detach(self) -> Transformer:
        """Take everything out again: the model with the very same modules as before. The bank has no tasks then.

        Raises:
            ValueError: it is detached already.
        """
        self._check([])
        self.mixed = []
        return restore(self.model)

    def _check(self, tasks: Tasks) -> None:
        if not self.mixed:
            raise ValueError("this bank is detached from its model; make a new one, TaskBank(model, sources)")
        if unknown := sorted({str(task) for task in tasks if task is not None and task not in self.names}):
            raise ValueError(f"there is no task {', '.join(unknown)}; there are {', '.join(self.names)}, and None")


def _wrappers_of(model: Transformer, task: str, source: Source) -> dict[tuple, Wrapper]:
    """The wrappers of one task, made for the moment on `model` itself: each by its site and its kind."""
    try:
        _enter(model, source)
        blocks = block_names(named_sites(model))
        found = [(site, wrapper) for site, wrappers in all_wrappers(model).items() for wrapper in wrappers]
        return {(site, *_kind(wrapper, layer_of(site, blocks) is not None)): wrapper for site, wrapper in found}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the source of {task} (file, model, or recipes with tensors) is unfit: {error}") from error
    finally:
        if attached(model):
            detach(model)


def _enter(model: Transformer, source: Source) -> None:
    """Attach what a source holds, with its tensors."""
    entries, tensors, base = held(source)
    if any(entry.train_also for entry in entries):
        raise ValueError("it trains whole modules beside its method (train_also), which rows cannot share")
    if base not in (None, base_hash(model)):
        raise ValueError("its base is another (weights, shape, precision); a list is taken if its tensors fit here")
    if isinstance(source, str | Path):
        load(model, source)  # with an eye on what a file may ask for
    else:
        for entry in entries:
            attach(model, entry.method)
        load_state_dict(model, tensors)


def _kind(wrapper: Wrapper, in_a_block: bool) -> tuple:
    """What serves such a wrapper in a mixed batch, and what all that share one have to have in common."""
    if type(wrapper) is LoRALinear and in_a_block:  # a head reads hidden states without knowing of which rows they are
        return (MixedLoRA, *sorted(wrapper.frozen_tensors()))
    if type(wrapper) is PrefixAttention and not (wrapper.recipe.gated or wrapper.recipe.reparameterize):
        return (MixedPrefix, wrapper.recipe.at)
    if type(wrapper) is Adapter:
        return (MixedAdapter, wrapper.joined, wrapper.recipe.activation)
    what = getattr(wrapper, "recipe", type(wrapper).__name__)
    raise ValueError(f"{what} cannot share a batch with other tasks; LoRA in blocks, adapters and plain prefixes can")

"""The state dict inside a checkpoint, under the names that a plain model has.

The same weights are saved under many names: training wraps the model, so `module.` or `_orig_mod.` stands in front or
in between; a class with a head keeps the Transformer as a part; a training loop saves the state dict beside its
optimizer's. All of this is names, and is undone here. What is no plain model any more (adapters, quantised weights,
shards of tensors) is refused with the way back.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What wraps a module, and so stands anywhere in a name: DataParallel, compile, FSDP, checkpointing, Lightning, Opacus.
WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_module",
}  # fmt: skip
# What programs call the model that is a part of theirs. Another architecture's name (roberta) is none of these: its
# tensors can have the same names below and mean something else.
HOLDERS = {
    "model", "base_model", "pretrained_model", "auto_model", "text_model", "language_model", "bert_model", "gpt2_model",
    "backbone", "encoder", "text_encoder", "net", "network", "transformer", "lm", "llm", "plm", "bert", "gpt", "gpt2",
}  # fmt: skip
COUNTERS = r"n_averaged$"  # how many models an average (torch.optim.swa_utils) is over
OF_TRAINING = re.compile(r"^opt|optim|sched|scaler|^amp|rng|random")  # beside a state dict: no weights of the model
UNQUANTISED = "choose the checkpoint before it was quantised, or dequantise it where it was made and save it in float32"
WAYS_BACK = (  # what a name betrays, and what to do
    (
        r"\.(lora_\w+|base_layer|modules_to_save|prompt_encoder)\.",
        "belongs to an adapter; merge it where it was made (merge_and_unload() of Hugging Face's peft) and save again",
    ),
    (
        r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|weight_scale\w*|absmax|nested_absmax|quant_\w+|_packed_params)"
        r"(\.|$)",
        f"belongs to quantised weights; {UNQUANTISED}",
    ),
    (r"(^|[._])flat_param", "is a part of flattened weights; gather them (FSDP's FULL_STATE_DICT) and save again"),
    (
        r"(^|\.)parametrizations\.|\.weight_(g|v|orig|mask)$",
        "is a parametrisation of a weight; remove it (remove_parametrizations, prune.remove) and save again",
    ),
    (
        r"(^|\.)(crossattention|ln_cross_attn)\.",
        "belongs to cross-attention, which is not computed; choose a model without",
    ),
    (r"(^|\.)distance_embedding\.", "belongs to relative positions, which are not computed; choose absolute positions"),
)


@dataclass(frozen=True)
class Form:
    """How an architecture is named: in its config, and tensor by tensor."""

    model: str  # in messages
    model_type: str  # in its config
    classes: str  # the names of its classes, as a pattern
    base: str  # where a class with a head keeps the Transformer
    roots: str  # the beginnings of the Transformer's names below it, as a pattern
    example: str  # one of these names
    not_used: str  # names of what has no place in our model, knowingly, as a pattern

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether this is the architecture of a config.json: by its model_type, or where it has none, its classes."""
        kind, classes = config.get("model_type"), config.get("architectures") or ()
        return kind == self.model_type or (
            kind is None and all(re.fullmatch(self.classes, str(name)) for name in classes)
        )


def plain_tensors(checkpoint: Mapping, form: Form) -> dict[str, Any]:
    """The tensors of the one state dict in `checkpoint`, under the names of the bare model with its heads.

    Args:
        checkpoint: a state dict, or what a training loop saved: a dict with the state dict somewhere in it.
        form: how the tensors are named.

    Raises:
        ValueError: no such state dict, several of them, weights beside it, or names that no plain model has.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"a state dict maps names to tensors, got {type(checkpoint).__name__}; pass model.state_dict(), and a "
            f"folder of files to from_pretrained"
        )
    tensors = _unwrapped(checkpoint, form)
    tensors = _renamed(tensors, {name: _without_wrappers(name) for name in tensors})
    tensors = _renamed(tensors, _without_prefix(list(tensors), form))
    return {name: tensor for name, tensor in tensors.items() if not re.match(f"{COUNTERS}|{form.not_used}", name)}


def left_out(tensors: dict[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """The tensors whose names begin with none of `prefixes`.

    Raises:
        ValueError: one of `prefixes` begins no name.
    """
    if isinstance(prefixes, str):
        raise ValueError(f"leave_out is a tuple of beginnings of names; write ({prefixes!r},)")
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in tensors):
            raise ValueError(f"leave_out names {prefix!r}, but no tensor's name begins so; take it off leave_out")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(prefixes))}


def one_of_each(tensors: dict[str, Tensor], copies: dict[str, str]) -> dict[str, Tensor]:
    """Without the copies of tied weights; a copy whose original was not saved takes its place.

    Args:
        tensors: by name.
        copies: copy -> original.

    Raises:
        ValueError: a copy differs from its original, so the checkpoint is not tied.
    """
    tensors = dict(tensors)
    for copy, original in copies.items():
        if copy not in tensors:
            continue
        tensor = tensors.pop(copy)
        tied = tensors.setdefault(original, tensor)
        if tied.shape != tensor.shape or not torch.equal(tied.float(), tensor.float()):
            raise ValueError(
                f"{copy!r} differs from {original!r}, but the config ties the language-model head to the embedding; "
                f"choose a tied checkpoint, or leave the head out (leave_out) if only hidden states are wanted; the "
                f"config of a Llama can say tie_word_embeddings=false"
            )
    return tensors


def check_weights(tensors: dict[str, Any]) -> None:
    """Raise ValueError, with the cure, for a name that no plain model has, or a value that is no weight."""
    for name in tensors:
        for pattern, way_back in WAYS_BACK:
            if re.search(pattern, name):
                raise ValueError(f"{name!r} {way_back}")
    for name, tensor in tensors.items():
        if trouble := _trouble(tensor):
            raise ValueError(f"{name!r} {trouble}")


def _trouble(tensor: Any) -> str | None:
    """Why a value cannot be read as a weight, and the cure."""
    kind = type(tensor).__name__
    if not isinstance(tensor, Tensor):
        return f"is no tensor but {kind}; make it one (torch.as_tensor), or take it out of the state dict"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {kind}; make it a plain tensor (dequantize(), full_tensor()) and save again"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}); {UNQUANTISED}"
    if tensor.layout is not torch.strided:
        return f"is not dense ({tensor.layout}); call to_dense() on it"
    if tensor.is_meta:
        return "has no data (device meta); load the weights before they are passed"
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"has the type {tensor.dtype}, but weights are float16, bfloat16, float32 or float64; {UNQUANTISED}"
    if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):  # which a NaN is, too; no copy is made
        return "has values that are not finite; the file is damaged, or its training diverged: choose another"
    return None


def _unwrapped(checkpoint: Mapping, form: Form) -> Mapping:
    """The state dict in a dict that may hold more."""
    found = list(_state_dicts(checkpoint, form))
    if len(found) > 1:
        raise ValueError(
            f"the checkpoint holds {len(found)} state dicts, {', '.join(repr(path) for path, _ in found)}; pass one"
        )
    if not found:
        names = ", ".join(repr(name) for name in list(checkpoint)[:3])
        raise ValueError(
            f"no tensor has a name of a {form.model}, such as {form.example!r}; there is {names or 'nothing'}: choose "
            f"a {form.model} in Hugging Face's form, or rename its tensors"
        )
    path, state_dict = found[0]
    beside = [name for name in _weights(checkpoint) if not name.startswith(f"{path}.")] if path else []
    if beside:
        raise ValueError(
            f"the checkpoint holds {beside[0]!r} beside the state dict {path!r}; pass the state dict alone"
        )
    if odd := [name for name in state_dict if not isinstance(name, str)]:
        raise ValueError(f"{odd[0]!r} is no name of a tensor; take it out of the state dict")
    return state_dict


def _state_dicts(checkpoint: Mapping, form: Form, path: str = "") -> Iterator[tuple[str, Mapping]]:
    """Every dict, at whatever depth, that holds values under the form's names; lists of shapes are none."""
    root = re.compile(rf"(^|\.)({form.roots})")
    values = [name for name, value in checkpoint.items() if not isinstance(value, torch.Size)]
    if any(root.search(_without_wrappers(str(name))) for name in values):
        yield path, checkpoint
        return
    for key, value in checkpoint.items():
        if isinstance(value, Mapping):
            yield from _state_dicts(value, form, f"{path}.{key}" if path else str(key))


def _weights(checkpoint: Mapping, path: str = "") -> Iterator[str]:
    """Where in the dict there are tensors with an axis that are not known to belong to training alone."""
    for key, value in checkpoint.items():
        name = f"{path}.{key}" if path else str(key)
        if OF_TRAINING.search(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _weights(value, name)
        elif isinstance(value, Tensor) and value.ndim:
            yield name


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _without_prefix(names: list[str], form: Form) -> dict[str, str]:
    """Each name -> the one below what holds the model: `model.bert.` for the Transformer, `model.` for its heads."""
    first = re.compile(rf"((?:[^.]+\.)*?)(?:{form.roots})")
    prefixes = {match[1]: name for name in names if (match := first.match(name))}
    if len(prefixes) > 1:
        begins = " and ".join(f"{prefix!r} ({name!r})" for prefix, name in sorted(prefixes.items())[:2])
        raise ValueError(
            f"the names of the Transformer's tensors begin with {begins}; pass the state dict of one model"
        )
    prefix = next(iter(prefixes))
    foreign = [part for part in prefix.split(".")[:-1] if part not in HOLDERS and not part.isdecimal()]
    if foreign:
        raise ValueError(
            f"the names begin with {prefix!r}, and {foreign[0]!r} is not known to hold a {form.model}; if it does, cut "
            f"it off: {{name.removeprefix({prefix!r}): tensor for name, tensor in state_dict.items()}}"
        )
    holder = prefix.removesuffix(f"{form.base}.")
    below = {name: name.removeprefix(prefix if name.startswith(prefix) else holder) for name in names}
    # The first files call a LayerNorm's weight and bias gamma and beta.
    return {name: re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", new)) for name, new in below.items()}


def _renamed(tensors: Mapping, new: dict[str, str]) -> dict[str, Any]:
    """The values under their new names.

    Raises:
        ValueError: two have the same new name.
    """
    old: dict[str, str] = {}
    for name in tensors:
        if other := old.get(new[name]):
            raise ValueError(f"{other!r} and {name!r} stand for one tensor, {new[name]!r}; pass one of them")
        old[new[name]] = name
    return {name: tensors[before] for name, before in old.items()}

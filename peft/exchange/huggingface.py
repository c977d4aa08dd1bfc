"""Adapters in and out of folders as Hugging Face's peft writes and reads them.

One folder holds one method, and one head that was trained whole beside it. What a folder cannot say, or we do not
compute, is refused: nothing is left out in silence.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from minitransformer.modes import undone
from peft.attach import attach, attached, declared, detach, load_state_dict, parts_of
from peft.checkpoint import complete_state
from peft.exchange import ia3, lora, prompts, vera
from peft.exchange.contents import FRONT, Found, Written, check_tensors
from peft.exchange.folder import Folder, read_folder, write
from peft.exchange.names import Names, names_of
from peft.exchange.options import Options
from peft.method import Wrapper
from peft.methods.dora import DoRALinear
from peft.methods.ia3 import Rescaled
from peft.methods.lora import LoRALinear
from peft.methods.prefix import PrefixAttention
from peft.methods.prompt import PromptEmbedding
from peft.methods.vera import VeRALinear
from peft.sites import all_wrappers, sites_of


class Kind(NamedTuple):
    """How one of their methods is read and written."""

    written: Callable[[dict[str, Any], Names], Written]
    found: Callable[[Options, dict[str, Tensor], Names, dict[str, Any]], Found]
    front: str = FRONT  # of the names of a head's tensors


KINDS = {
    "LORA": Kind(lora.written, lora.found),
    "IA3": Kind(ia3.written, ia3.found),
    "VERA": Kind(vera.written, vera.found),
    "PREFIX_TUNING": Kind(prompts.written_prefix, prompts.found_prefix, "base_model."),
    "PROMPT_TUNING": Kind(prompts.written_prompt, prompts.found_prompt, "base_model."),
}
PEFT_TYPES: dict[type[Wrapper], str] = {
    LoRALinear: "LORA",
    DoRALinear: "LORA",
    Rescaled: "IA3",
    VeRALinear: "VERA",
    PrefixAttention: "PREFIX_TUNING",
    PromptEmbedding: "PROMPT_TUNING",
}


def to_huggingface(model: nn.Module, folder: str | Path, base_model: str | None = None) -> None:
    """Write the attached method as Hugging Face's peft does: `PeftModel.from_pretrained(their_model, folder)` reads it.

    Their model has the same frozen weights, also where those were rounded, or are what PiSSA left of them: give them to
    it by `save_pretrained`. A `SequenceClassifier` is theirs "for token classification": it scores each
    token, and the scores of a row are their mean here, or the first (`pool`). Behind a prefix their text stands at
    positions n, n + 1, …, ours at 0, 1, …: the keys are turned for that (`prompts.py`).

    Args:
        model: of a shape that from_llama, from_bert or from_gpt2 gives, alone or in a `SequenceClassifier`.
        folder: is made, whole or not at all.
        base_model: the name or path of their model, which `AutoPeftModel` needs.

    Raises:
        ValueError: nothing is attached; a method, or several, that a folder cannot hold; a prefix with learned
            positions; a prompt for masked words; what `peft.save` refuses.
        OSError: there is something of that name, or it cannot be written.
    """
    complete_state(model)
    names = names_of(model)
    wrappers, peft_type = _the_one_kind(model, names)
    kind = KINDS[peft_type]
    options, tensors, record = kind.written(wrappers, names)
    head = _trained_head(model, names)
    tensors |= {f"{kind.front}{theirs}": tensor for theirs, tensor in head.items()}
    is_gpt2 = names.form.model_type == "gpt2"
    config = options | {
        "task_type": _task(names),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in head}) or None,
    }
    config |= {"fan_in_fan_out": is_gpt2} if "target_modules" in options else {}
    write(folder, Folder(config, tensors, record))


def from_huggingface(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attach what a folder of Hugging Face's peft holds, in place; returns the model.

    Ranks or alphas that differ become several recipes. All tensors of LoRA are trained if training goes on, whichever
    were before.

    Args:
        model: with the weights that the adapter was trained on, as from_llama, from_bert or from_gpt2 gives them.
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: a method is attached already; a folder that is damaged or not of this model; an option that we do
            not compute. The model is as it was then.
    """
    if attached(model):
        raise ValueError("a method is attached to this model; detach(model) first, or load into a fresh model")
    config, tensors, record = read_folder(folder)
    check_tensors(tensors)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in KINDS:
        raise ValueError(f"{folder} is of peft_type {peft_type!r}, but only {', '.join(KINDS)} are supported")
    kind, options, names = KINDS[peft_type], Options(config), names_of(model, tensors)
    _check_task(options, names)
    head = _head(tensors, options, names, kind.front)
    rest = {name: tensor for name, tensor in tensors.items() if name not in head}
    recipes, own = kind.found(options, rest, names, record)
    options.finish()  # once more: a kind that has not called it before its tensors would ignore options
    if record:
        raise ValueError(f"the metadata of the tensors speaks of {min(record)!r}, which is no part of them")
    own |= {ours: tensors[theirs] for theirs, ours in head.items()}
    train_also = ("head",) if head else ()
    try:
        for recipe in recipes:
            attach(model, recipe, train_also=train_also if recipe is recipes[0] else ())
        state = declared(model)
        with undone([*state.values()]):
            load_state_dict(model, {name: own[name] for name in state})
    except BaseException:
        if attached(model):
            detach(model)
        raise
    return model


def _the_one_kind(model: nn.Module, names: Names) -> tuple[dict[str, Wrapper], str]:
    """The wrappers by site, and their peft_type; ValueError if a folder cannot hold them."""
    at_sites, methods = all_wrappers(model), [entry.method for entry in attached(model)]
    kinds = {type(wrapper) for wrappers in at_sites.values() for wrapper in wrappers}
    if len(kinds) > 1:
        listed = "; ".join(map(str, methods))
        raise ValueError(f"a folder holds one method, and this model has {listed}; attach one of them alone")
    kind = kinds.pop()
    if kind not in PEFT_TYPES:
        raise ValueError(f"Hugging Face's peft has no form for what {methods[0]} computes; save it by peft.save")
    on_linears = KINDS[PEFT_TYPES[kind]].front == FRONT
    if strange := [site for site in at_sites if on_linears and site not in names.places]:
        raise ValueError(f"{strange[0]} has no counterpart in theirs; choose other targets")
    return {site: wrapper for site, (wrapper,) in at_sites.items()}, PEFT_TYPES[kind]


def _trained_head(model: nn.Module, names: Names) -> dict[str, Tensor]:
    """The tensors of a head that is trained whole, by their names; ValueError for another module."""
    whole = {name: part for name, part, _ in parts_of(sites_of(model)) if not isinstance(part, Wrapper)}
    if whole.keys() - {"head"} or (whole and not names.head):
        raise ValueError(
            f"{', '.join(sorted(whole))} is trained whole, which a folder can say of an untied LM head or of the head "
            f"of a SequenceClassifier alone; leave it out of train_also"
        )
    return {theirs: getattr(whole["head"], ours.rpartition(".")[2]) for ours, theirs in names.head.items() if whole}


def _head(tensors: dict[str, Tensor], options: Options, names: Names, front: str) -> dict[str, str]:
    """The names of the tensors of a head that was trained whole -> ours.

    Raises:
        ValueError: `modules_to_save` names what is no such head here, or a tensor of it is missing.
    """
    modules = {theirs.rpartition(".")[0] for theirs in names.head.values()}
    asked = {*options.names("modules_to_save")}
    if unknown := asked - modules - {"classifier", "score"}:  # which their library names whether they are there or not
        raise ValueError(f"modules_to_save has {min(unknown)!r}, and this model has no such head of its own")
    head = {f"{front}{theirs}": ours for ours, theirs in names.head.items() if asked & modules}
    if absent := [name for name in head if name not in tensors]:
        raise ValueError(f"the folder lacks {absent[0]}, for which modules_to_save asks; get it again")
    return head


def _check_task(options: Options, names: Names) -> None:
    """Raise ValueError for a task whose head we do not compute."""
    if options.get("task_type") == "SEQ_CLS":
        raise ValueError(
            "task_type SEQ_CLS scores the last token, or BERT's pooled first one, which no head of ours does; train "
            "it for TOKEN_CLS, or take the head and modules_to_save out of the folder, and set task_type to "
            "FEATURE_EXTRACTION"
        )
    options.only("task_type", None, "CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION")
    if options.get("task_type") == "CAUSAL_LM" and not names.config.causal:
        raise ValueError("task_type CAUSAL_LM is a decoder's, and this model is an encoder; load it into a decoder")


def _task(names: Names) -> str | None:
    """Their task_type, which says by which class the folder is read."""
    if names.root:
        return "TOKEN_CLS"
    if names.config.lm_head == "none":
        return "FEATURE_EXTRACTION"
    return "CAUSAL_LM" if names.config.causal else None  # they have none for BERT's masked words

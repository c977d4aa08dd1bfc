"""LoRA and DoRA in Hugging Face's form (peft_type LORA).

    base_model.model.{module}.lora_A.weight            [r, d_in]       our A
    base_model.model.{module}.lora_B.weight            [d_out, r]      our B
    base_model.model.{module}.lora_magnitude_vector    [d_out]         our magnitude, with use_dora

Ranks and alphas that differ are rank_pattern and alpha_pattern there, and several recipes here. Which factor is trained
(`LoRA.train`) is nothing that a folder says: what is read trains both.
"""

from typing import Any

from torch import Tensor

from peft.exchange.contents import FRONT, Found, Written, check_shape
from peft.exchange.fused import Update, apart, joined
from peft.exchange.names import Names
from peft.exchange.options import Options, as_count, as_number
from peft.exchange.targets import by_module, check_pattern, entering, matched, patterned, read_pattern, targets_of
from peft.methods.dora import DoRA, DoRALinear
from peft.methods.lora import LoRA, LoRALinear

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def written(wrappers: dict[str, LoRALinear], names: Names) -> Written:
    """The folder's contents for these wrappers by site.

    Raises:
        ValueError: options that one folder cannot hold together; parts of c_attn with different scales.
    """
    rs = _one(wrappers, "rank_stabilized")
    of_module: dict[str, dict[str | None, Update]] = {}
    for site, wrapper in wrappers.items():
        module, part = names.places[site]
        own = Update(wrapper.A, wrapper.B, plain(wrapper.recipe.alpha), wrapper.tensors().get("magnitude"))
        of_module.setdefault(module, {})[part] = own
    updates, record = {}, {}
    for module, parts in of_module.items():
        if None in parts:
            updates[module] = parts[None]
        else:
            updates[module], ranges = joined(parts, names.linears_of(module), rs, module)
            record |= {module: ranges} if ranges else {}
    tensors = {}
    for module, update in updates.items():
        tensors |= {f"{FRONT}{module}.{A}": update.A, f"{FRONT}{module}.{B}": update.B}
        tensors |= {} if update.magnitude is None else {f"{FRONT}{module}.{MAGNITUDE}": update.magnitude}
    rank, ranks = patterned({module: update.rank for module, update in updates.items()})
    alpha, alphas = patterned({module: plain(update.alpha) for module, update in updates.items()})
    options = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": _one(wrappers, "dropout"),
        "use_rslora": rs,
        "use_dora": any(isinstance(wrapper, DoRALinear) for wrapper in wrappers.values()),
        "target_modules": targets_of(updates, names),
        "bias": "none",
        "init_lora_weights": True,
    }
    return Written(options, tensors, record)


def found(options: Options, tensors: dict[str, Tensor], names: Names, record: dict[str, Any]) -> Found:
    """The recipes and tensors that a folder holds; what is used of the record is taken out of it.

    Raises:
        ValueError: an option, a name or a shape that does not fit.
    """
    rs, is_dora = options.flag("use_rslora"), options.flag("use_dora")
    same = {"dropout": options.number("lora_dropout", 0.0), "rank_stabilized": rs}
    updates: dict[str, Update] = {}
    for module, update in _updates(options, tensors, names, is_dora).items():
        sites = names.modules[module]
        parts = {None: update}
        if None not in sites:
            parts = apart(update, names.linears_of(module), record.pop(module, None), rs)
        updates |= {sites[part]: own for part, own in parts.items()}
    together: dict[tuple[int, float | int], list[str]] = {}
    for site, update in updates.items():
        together.setdefault((update.rank, update.alpha), []).append(site)
    kind, recipes = DoRA if is_dora else LoRA, []
    for (rank, alpha), sites in together.items():
        entered = entering(sites, names)
        recipes += [kind(rank=rank, alpha=alpha, targets=names, layers=layers, **same) for names, layers in entered]
    ours = {}
    for site, update in updates.items():
        ours |= {f"{site}.A": update.A, f"{site}.B": update.B}
        ours |= {f"{site}.magnitude": update.magnitude} if is_dora else {}
    return Found(recipes, ours)


def _updates(options: Options, tensors: dict[str, Tensor], names: Names, is_dora: bool) -> dict[str, Update]:
    """The update of each module of theirs, once it is known to fit."""
    rank, ranks = options.count("r", 8), read_pattern(options, "rank_pattern")
    alpha, alphas = options.number("lora_alpha", 8), read_pattern(options, "alpha_pattern")
    options.only("bias", "none")
    options.only("init_lora_weights", True, False, "gaussian", "orthogonal")  # others change the frozen weights
    options.only("loftq_config", {})
    options.unused({"megatron_core": str, "qalora_group_size": int})  # of options that are off
    modules, updates = by_module(tensors, names, options, (A, B, MAGNITUDE) if is_dora else (A, B)), {}
    check_pattern(ranks, modules), check_pattern(alphas, modules)
    for module, own in modules.items():
        d_in, d_out = names.shape(module)
        r = as_count(f"the rank of {module}", matched(ranks, module, rank))
        check_shape(f"{FRONT}{module}.{A}", own[A], r, d_in)
        check_shape(f"{FRONT}{module}.{B}", own[B], d_out, r)
        if is_dora:
            check_shape(f"{FRONT}{module}.{MAGNITUDE}", own[MAGNITUDE], d_out)
        a = as_number(f"the alpha of {module}", matched(alphas, module, alpha))
        updates[module] = Update(own[A], own[B], a, own.get(MAGNITUDE))
    return updates


def _one(wrappers: dict[str, LoRALinear], option: str) -> Any:
    """The value of an option that a folder has once."""
    values = {getattr(wrapper.recipe, option) for wrapper in wrappers.values()}
    if len(values) > 1:
        raise ValueError(f"a folder has one {option} for all layers, this model {sorted(values)}; give all the same")
    return values.pop()


def plain(alpha: float | int) -> float | int:
    """3 for 3.0, as their files have it."""
    return int(alpha) if alpha == int(alpha) else alpha

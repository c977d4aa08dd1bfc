"""LoRA and DoRA in Hugging Face's form (peft_type LORA).

    base_model.model.{module}.lora_A.weight            [r, d_in]       our A
    base_model.model.{module}.lora_B.weight            [d_out, r]      our B
    base_model.model.{module}.lora_magnitude_vector    [d_out]         our magnitude, with use_dora

Ranks and alphas that differ are rank_pattern and alpha_pattern there, and several recipes here. Which factor is trained
(`LoRA.train`) is nothing that a folder says: one that is read trains both.
"""

import math
import re
from typing import Any

from torch import Tensor

from peft.exchange.found import (
    FRONT,
    Found,
    Written,
    by_module,
    check_shape,
    entering,
    patterned,
    require_targeted,
    targets_of,
    whole,
)
from peft.exchange.fused import Update, apart, joined
from peft.exchange.names import Names
from peft.exchange.options import Options, as_number
from peft.methods.dora import DoRA, DoRALinear
from peft.methods.lora import LoRA, LoRALinear

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def written(wrappers: dict[str, LoRALinear], names: Names) -> Written:
    """The folder's contents for these wrappers by site.

    Raises:
        ValueError: options that one folder cannot hold together; parts of c_attn with different scales.
    """
    rs = _same(wrappers, "rank_stabilized")
    of_module: dict[str, dict[str | None, Update]] = {}
    for site, wrapper in wrappers.items():
        place = names.places[site]
        own = Update(wrapper.A, wrapper.B, wrapper.recipe.alpha, wrapper.tensors().get("magnitude"))
        of_module.setdefault(place.module, {})[place.part] = own
    updates, record = {}, {}
    for module, parts in of_module.items():
        if None in parts:
            updates[module] = parts[None]
            continue
        if not _equal([update.alpha / _divisor(update.rank, rs) for update in parts.values()]):
            raise ValueError(f"{module} is one layer, but its parts have different scales; give them one alpha / rank")
        weights = {part: names.linears[site].weight for part, site in names.modules[module].items()}
        updates[module], ranges = joined(parts, weights, rs)
        record |= {module: ranges} if ranges else {}
    tensors = {}
    for module, update in updates.items():
        tensors |= {f"{FRONT}{module}.{A}": update.A, f"{FRONT}{module}.{B}": update.B}
        tensors |= {} if update.magnitude is None else {f"{FRONT}{module}.{MAGNITUDE}": update.magnitude}
    rank, ranks = patterned({module: update.rank for module, update in updates.items()})
    alpha, alphas = patterned({module: whole(update.alpha) for module, update in updates.items()})
    options = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": _same(wrappers, "dropout"),
        "use_rslora": rs,
        "use_dora": any(isinstance(wrapper, DoRALinear) for wrapper in wrappers.values()),
        "target_modules": targets_of(updates, names),
        "bias": "none",
        "init_lora_weights": True,
    }
    return Written(options, tensors, record)


def found(options: Options, tensors: dict[str, Tensor], names: Names, record: dict[str, Any]) -> Found:
    """The recipes and tensors that a folder holds.

    Raises:
        ValueError: an option, a name or a shape that does not fit.
    """
    rank, alpha = options.count("r", 8), options.number("lora_alpha", 8)
    dropout, rs, is_dora = options.number("lora_dropout", 0.0), options.flag("use_rslora"), options.flag("use_dora")
    ranks, alphas = _pattern(options, "rank_pattern"), _pattern(options, "alpha_pattern")
    options.only("bias", "none")
    options.only("init_lora_weights", True, False, "gaussian", "orthogonal")  # others change the frozen weights
    options.unused("megatron_core", "qalora_group_size")  # of options that are off
    modules = by_module(tensors, names, options, (A, B, MAGNITUDE) if is_dora else (A, B))
    require_targeted(modules, names, options)
    updates: dict[str, Update] = {}
    for module, own in modules.items():
        sites = names.modules[module]
        linears = {part: names.linears[site] for part, site in sites.items()}
        d_in, d_out = next(iter(linears.values())).in_features, sum(layer.out_features for layer in linears.values())
        r = _matched(ranks, module, rank)
        if type(r) is not int or r < 1:
            raise ValueError(f"adapter_config.json has the rank {r!r} for {module}, where a whole number is needed")
        check_shape(f"{FRONT}{module}.{A}", own[A], r, d_in)
        check_shape(f"{FRONT}{module}.{B}", own[B], d_out, r)
        if is_dora:
            check_shape(f"{FRONT}{module}.{MAGNITUDE}", own[MAGNITUDE], d_out)
        update = Update(own[A], own[B], as_number("alpha", _matched(alphas, module, alpha)), own.get(MAGNITUDE))
        if None in sites:
            updates[sites[None]] = update
        else:
            weights = {part: layer.weight for part, layer in linears.items()}
            parts = apart(update, weights, record.get(module), rs)
            updates |= {sites[part]: parts[part] for part in parts}
    if strange := record.keys() - modules.keys():
        raise ValueError(f"the metadata of adapter_model.safetensors speaks of {min(strange)!r}; save it without")
    together: dict[tuple[int, float], list[str]] = {}
    for site, update in updates.items():
        together.setdefault((update.rank, update.alpha), []).append(site)
    kind, recipes = DoRA if is_dora else LoRA, []
    for (r, a), sites in together.items():
        for targets, layers in entering(sites, names):
            options_of_ours = {"dropout": dropout, "rank_stabilized": rs, "targets": targets, "layers": layers}
            recipes.append(kind(rank=r, alpha=a, **options_of_ours))
    ours = {}
    for site, update in updates.items():
        ours |= {f"{site}.A": update.A, f"{site}.B": update.B}
        ours |= {f"{site}.magnitude": update.magnitude} if is_dora else {}
    return Found(recipes, ours)


def _divisor(rank: int, stabilized: bool) -> float:
    return math.sqrt(rank) if stabilized else rank


def _equal(numbers: list[float]) -> bool:
    return all(math.isclose(number, numbers[0], rel_tol=1e-12) for number in numbers)


def _same(wrappers: dict[str, LoRALinear], option: str) -> Any:
    values = {getattr(wrapper.recipe, option) for wrapper in wrappers.values()}
    if len(values) > 1:
        raise ValueError(f"a folder has one {option} for all layers, the model has {sorted(values)}; save them apart")
    return values.pop()


def _pattern(options: Options, name: str) -> dict[str, Any]:
    """Names of modules, or their ends, with what holds for them."""
    pattern = options.get(name, {})
    if not isinstance(pattern, dict) or not all(re.fullmatch(r"\^?[\w.]+", key) for key in pattern):
        raise ValueError(
            f"adapter_config.json has {name}={pattern!r}, where plain names of modules are needed; write the names out"
        )
    return pattern


def _matched(pattern: dict[str, Any], module: str, common: Any) -> Any:
    """The value for a module: of the first name that is its own or its end by whole parts, as their library does."""
    return next((pattern[key] for key in pattern if re.match(rf"(.*\.)?({key})$", module)), common)

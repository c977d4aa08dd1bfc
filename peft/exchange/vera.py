"""VeRA in Hugging Face's form (peft_type VERA).

    base_model.vera_A                           [r, d_in]      our A, shared by all layers
    base_model.vera_B                           [d_out, r]     our B
    base_model.model.{module}.vera_lambda_d     [r]            our d
    base_model.model.{module}.vera_lambda_b     [d_out]        our b

GPT-2's c_attn is refused: as one layer it takes three times as many rows of B as query, key and value here, which all
take the first.
"""

from typing import Any

from torch import Tensor

from peft.exchange.contents import FRONT, Found, Written, check_shape
from peft.exchange.names import Names
from peft.exchange.options import Options
from peft.exchange.targets import by_module, entering, targets_of
from peft.methods.vera import VeRA, VeRALinear

SHARED = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
D, B = "vera_lambda_d", "vera_lambda_b"


def written(wrappers: dict[str, VeRALinear], names: Names) -> Written:
    """The folder's contents for these wrappers by site.

    Raises:
        ValueError: several pairs of A and B, or a part of c_attn.
    """
    first = next(iter(wrappers.values()))
    if any(wrapper.A is not first.A or wrapper.B is not first.B for wrapper in wrappers.values()):
        raise ValueError("a folder has one A and one B of VeRA, the model has several; attach one VeRA alone")
    tensors = {SHARED["A"]: first.A, SHARED["B"]: first.B}
    modules = []
    for site, wrapper in wrappers.items():
        module, part = names.places[site]
        _refuse_fused(module, part)
        modules.append(module)
        tensors |= {f"{FRONT}{module}.{D}": wrapper.d, f"{FRONT}{module}.{B}": wrapper.b}
    options = {
        "peft_type": "VERA",
        "r": len(first.d),
        "target_modules": targets_of(modules, names),
        "vera_dropout": 0.0,
        "projection_prng_key": 0,
        "save_projection": True,
        "bias": "none",
    }
    return Written(options, tensors, {})


def found(options: Options, tensors: dict[str, Tensor], names: Names, record: dict[str, Any]) -> Found:
    """The recipe and the tensors that a folder holds.

    Raises:
        ValueError: an option, a name or a shape that does not fit; A and B that are not in the folder.
    """
    rank, initial_d = options.count("r", 256), options.number("d_initial", 0.1)
    options.only("bias", "none")
    options.only("vera_dropout", 0.0, 0)
    options.unused({"init_weights": bool, "projection_prng_key": int, "save_projection": bool})
    if absent := [name for name in SHARED.values() if name not in tensors]:
        raise ValueError(f"the folder lacks {absent[0]}; save it with save_projection=True where it was made")
    own = {name: tensor for name, tensor in tensors.items() if name not in SHARED.values()}
    modules = by_module(own, names, options, (D, B))
    sites, ours = [], {}
    for module, parts in modules.items():
        for part, site in names.modules[module].items():
            _refuse_fused(module, part)
            check_shape(f"{FRONT}{module}.{D}", parts[D], rank)
            check_shape(f"{FRONT}{module}.{B}", parts[B], names.linears[site].out_features)
            sites.append(site)
            ours |= {f"{site}.{ending}": tensors[name] for ending, name in SHARED.items()}
            ours |= {f"{site}.d": parts[D], f"{site}.b": parts[B]}
    check_shape(SHARED["A"], tensors[SHARED["A"]], rank, max(names.linears[site].in_features for site in sites))
    check_shape(SHARED["B"], tensors[SHARED["B"]], max(names.linears[site].out_features for site in sites), rank)
    entered = entering(sites, names)
    if len(entered) > 1:
        raise ValueError("our VeRA enters the same layers of each block; choose a folder whose target_modules do so")
    targets, layers = entered[0]
    return Found([VeRA(rank=rank, initial_d=initial_d, targets=targets, layers=layers)], ours)


def _refuse_fused(module: str, part: str | None) -> None:
    if part is not None:
        raise ValueError(
            f"{module} is one layer for query, key and value, with rows of B for each, where ours take the same; "
            f"choose other targets for VeRA on GPT-2, or LoRA"
        )

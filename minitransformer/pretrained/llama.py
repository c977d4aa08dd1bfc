"""The Llama family, from Hugging Face's weights into our decoder: Llama, Qwen2, Mistral, SmolLM and their like.

Sources: Touvron et al. 2023, "LLaMA", section 2.2: a causal pre-norm Transformer with RMSNorm, SwiGLU, rotary positions
and no biases. Qwen2 (Yang et al. 2024, section 2.2.1) has biases on queries, keys and values; in each
family the larger models have fewer heads for keys and values.

What is not computed is refused by name: scaled rotary angles or logits, sliding windows, experts, parallel blocks.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from minitransformer.config import TransformerConfig
from minitransformer.pretrained.huggingface import (
    SIZES,
    Writer,
    check_arithmetic,
    check_options,
    filled,
    read_activation,
    read_number,
    read_sizes,
    written_activation,
    written_sizes,
)
from minitransformer.pretrained.state_dict import Form, check_weights, left_out, one_of_each, plain_tensors
from minitransformer.transformer import Transformer


def _form(model: str) -> Form:
    return Form(
        model=model,
        model_type=model.lower(),
        classes=rf"{model}(Model|For\w+)",
        base="model",
        roots=r"embed_tokens\.|layers\.\d+\.(self_attn|mlp|input_layernorm|post_attention_layernorm)\.",
        example="embed_tokens.weight",
        not_used=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$",  # the angles, stored in older files
    )


FORMS = LLAMA, QWEN2, MISTRAL = _form("Llama"), _form("Qwen2"), _form("Mistral")

# Our module -> Hugging Face's.
BLOCK = {  # below blocks.{i} and layers.{i}
    "norm_attention": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "norm_feedforward": "post_attention_layernorm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
OUTSIDE = {"embedding.token": "embed_tokens", "norm": "norm", "head": "lm_head"}
HEAD = "lm_head.weight"
COPIES = {HEAD: "embed_tokens.weight"}  # of a tied weight: either or both may be saved

READ = ("rope_theta", "rope_type", "rope_scaling", "rope_parameters", "sliding_window", "max_window_layers")
BIAS = {  # attention_bias and mlp_bias -> ours
    (False, False): "none",
    (True, False): "query+key+value+output",
    (False, True): "gate+up+down",
    (True, True): "all",
}
CHOOSE = "choose such a checkpoint"


def from_llama(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    leave_out: tuple[str, ...] = (),
    assign: bool = False,
) -> Transformer:
    """A model of the Llama family with these weights, float32, in evaluation mode (`fit` switches to training).

    Args:
        state_dict: of `LlamaModel` or a class on top of it (`Qwen2…`, `Mistral…`), names as Hugging Face writes them.
            What training puts round a model (`module.`, `_orig_mod.`, `model.`) or a state dict ({"state_dict": …}) is
            seen through. The head is tied where the config says so, saved or not (lm_head="tied"); otherwise it has a
            weight of its own (lm_head="untied"); where there is none, the model gives hidden states only ("none").
        config: the contents of config.json.
        leave_out: beginnings of names, as messages give them, that are not wanted: ("score.",) or ("lm_head.",).
        assign: the model is made of the tensors themselves, of whatever type, instead of float32 copies: half the
            memory, where the state dict serves nothing else.

    Raises:
        ValueError: an option that we do not compute; a tensor that is missing, unexpected, of a wrong shape, or no
            weight; tied weights that differ; a beginning in `leave_out` that no name has.
    """
    known = [form for form in FORMS if isinstance(config, Mapping) and form.is_of(config)]
    form = known[0] if known else LLAMA
    sizes = (*SIZES.values(), *["num_key_value_heads"] * (form is not LLAMA))
    check_options(config, form, sizes, {}, READ, optional=("head_dim", "num_key_value_heads"))
    _check_windows(config, form)
    saved = plain_tensors(state_dict, form)
    tensors = left_out(saved, leave_out)
    check_weights(tensors)
    lm_head = "untied" if HEAD in tensors else "none"
    if config.get("tie_word_embeddings", False):
        tensors = one_of_each(tensors, COPIES)
        lm_head = "tied" if lm_head == "untied" or HEAD not in saved else "none"
    return filled(_our_config(config, lm_head, form), tensors, names, assign)


def _check_windows(config: Mapping[str, Any], form: Form) -> None:
    """Raise ValueError where a layer sees less than the whole text."""
    kinds = config.get("layer_types") or []
    other = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds]
    if other:
        raise ValueError(f"config has layer_types with {other[0]!r}, but only 'full_attention' is supported; {CHOOSE}")
    if form is QWEN2:  # its window is off, unless use_sliding_window is on
        return
    window = config.get("sliding_window", 4096 if form is MISTRAL else None)
    if window is not None and (type(window) is not int or window < config["max_position_embeddings"]):
        raise ValueError(
            f"config has sliding_window={window!r}, but only windows as long as max_position_embeddings "
            f"({config['max_position_embeddings']}) are supported, which hide nothing; choose a checkpoint without a "
            f"window, or lower max_position_embeddings to the window: texts up to that length are computed alike"
        )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary angles; ValueError for angles of another kind."""
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = config.get(name) or {}
        plain = isinstance(given, Mapping) and given.get("rope_type", given.get("type", "default")) == "default"
        if not plain or given.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
            raise ValueError(f"config has {name}={given!r}, but only plain rotary angles are supported; {CHOOSE}")
        found |= given
    check_arithmetic(found, READ)
    if {"rope_theta"} <= config.keys() & found.keys() and config["rope_theta"] != found["rope_theta"]:
        raise ValueError(
            f"config has rope_theta={config['rope_theta']!r} and {found['rope_theta']!r}; keep the right one"
        )
    return read_number({**config, **found}, "rope_theta", 10_000.0)


def names(n_layers: int) -> dict[str, str]:
    """Our module -> Hugging Face's: all are below `model`, but for the head."""
    layers = {f"blocks.{i}.{ours}": f"layers.{i}.{theirs}" for i in range(n_layers) for ours, theirs in BLOCK.items()}
    return OUTSIDE | layers


def _our_config(config: Mapping[str, Any], lm_head: str, form: Form) -> TransformerConfig:
    d_model, n_heads = config["hidden_size"], config["num_attention_heads"]
    n_kv_heads, head_dim = config.get("num_key_value_heads") or n_heads, config.get("head_dim") or 0
    asked = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return TransformerConfig(
        **read_sizes(config, SIZES),
        causal=True,
        norm="pre",
        activation=read_activation(config.get("hidden_act", "silu")),
        norm_eps=read_number(config, "rms_norm_eps", 1e-6),
        lm_head=lm_head,
        position="rotary",
        rope_theta=_rope_theta(config),
        norm_type="rms",
        gated=True,
        n_kv_heads=0 if n_kv_heads == n_heads else n_kv_heads,
        head_dim=0 if head_dim * n_heads == d_model else head_dim,
        bias={LLAMA: BIAS[asked], QWEN2: "query+key+value", MISTRAL: "none"}[form],
    )


def _their_config(config: TransformerConfig, form: Form) -> dict[str, Any]:
    asked = next((asked for asked, bias in BIAS.items() if bias == config.bias), (False, False))
    biases = {"attention_bias": asked[0], "mlp_bias": asked[1]} if form is LLAMA else {}
    return {
        **written_sizes(config, SIZES),
        **biases,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.d_head,
        "hidden_act": written_activation(config.activation),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }


def _writer(form: Form) -> Writer:
    classes = {"none": f"{form.model}Model", **dict.fromkeys(("tied", "untied"), f"{form.model}ForCausalLM")}
    return Writer(form, classes, partial(_their_config, form=form), partial(_our_config, form=form), names)


WRITERS = _writer(LLAMA), _writer(QWEN2)  # a Mistral is written as the Llama that it is

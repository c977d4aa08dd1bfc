"""Folders of Hugging Face's peft by hand: their names of modules, and what they compute, as a change of the weights.

`changed` takes a state dict of theirs, as it lies in a checkpoint, and gives that of a model without any method which
computes what theirs computes with the folder. So our readers of checkpoints and a plain Transformer are the oracle.
"""

import json
import re
from functools import cache

import torch
from reference.golden import read_golden
from reference.llama_shapes import N_WORDS, weight
from safetensors.torch import load_file, save_file

LLAMA = {
    "model_type": "llama", "vocab_size": N_WORDS, "max_position_embeddings": 16, "hidden_size": 24,
    "rms_norm_eps": 1e-5, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_LAYER = {
    "self_attn.q_proj": (24, 24), "self_attn.k_proj": (12, 24), "self_attn.v_proj": (12, 24),
    "self_attn.o_proj": (24, 24), "mlp.gate_proj": (40, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40),
}  # fmt: skip
BASE = "base_model.model."


@cache
def state_dict(family: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the config of a tiny checkpoint: "llama", "bert" or "gpt2", with its language-model head."""
    if family != "llama":
        golden = read_golden(f"huggingface_{family}")
        kind = {"bert": "BertForMaskedLM", "gpt2": "GPT2LMHeadModel"}[family]
        return {name: golden.weight[name] for name in golden.names[kind]}, golden.config
    shapes = {"model.embed_tokens.weight": (N_WORDS, 24), "model.norm.weight": (24,), "lm_head.weight": (N_WORDS, 24)}
    for layer in range(2):
        front = f"model.layers.{layer}."
        shapes |= {f"{front}{name}.weight": shape for name, shape in LLAMA_LAYER.items()}
        shapes |= {f"{front}{name}_layernorm.weight": (24,) for name in ("input", "post_attention")}
    return {name: weight(name, shape) for name, shape in shapes.items()}, LLAMA


def read(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and the tensors of a folder."""
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def write(folder, config: dict, tensors: dict[str, torch.Tensor], metadata: dict | None = None):
    """A folder with these two files."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    return folder


def changed(
    weights: dict[str, torch.Tensor], config: dict, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state dict of a plain model that computes the same."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    change = {"LORA": _lora, "IA3": _ia3, "VERA": _vera}[config["peft_type"]]
    endings = r"\.(lora_A\.weight|ia3_l|vera_lambda_d)$"
    for module in [re.sub(endings, "", name) for name in tensors if re.search(endings, name)]:
        own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        own |= {
            name.removeprefix("base_model."): t for name, t in tensors.items() if name.startswith("base_model.vera")
        }
        module = module.removeprefix(BASE)
        is_conv1d = re.search(r"\.c_(attn|proj|fc)$", module)  # [in, out]
        frozen = weights[f"{module}.weight"].T if is_conv1d else weights[f"{module}.weight"]
        new, bias = change(module, frozen, weights.get(f"{module}.bias"), config, own)
        weights[f"{module}.weight"] = new.T if is_conv1d else new
        if bias is not None:
            weights[f"{module}.bias"] = bias
    for name, tensor in tensors.items():  # of a head that was trained whole
        if name.removeprefix(BASE) in weights:
            weights[name.removeprefix(BASE)] = tensor
    return weights


def _lora(module, W, bias, config, own):
    r = _patterned(config["r"], config.get("rank_pattern") or {}, module)
    alpha = _patterned(config["lora_alpha"], config.get("alpha_pattern") or {}, module)
    A, B = own["lora_A.weight"], own["lora_B.weight"]
    assert len(A) == r
    new = W + alpha / (r**0.5 if config.get("use_rslora") else r) * B @ A
    if config.get("use_dora"):
        new = own["lora_magnitude_vector"][:, None] * new / new.norm(dim=1, keepdim=True)
    return new, bias


def _ia3(module, W, bias, config, own):
    scale = own["ia3_l"]  # [d_out, 1] of the output, [1, d_in] of the input
    is_input = any(module == end or module.endswith(f".{end}") for end in config["feedforward_modules"])
    assert list(scale.shape) == ([1, W.shape[1]] if is_input else [W.shape[0], 1])
    return W * scale, bias if is_input or bias is None else bias * scale[:, 0]


def _vera(module, W, bias, config, own):
    A, B = own["vera_A"][:, : W.shape[1]], own["vera_B"][: W.shape[0]]
    return W + own["vera_lambda_b"][:, None] * B @ (own["vera_lambda_d"][:, None] * A), bias


def _patterned(common, pattern, module):
    """Their rule: the first key that matches the end of the name, by whole parts."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), common)

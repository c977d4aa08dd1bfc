"""What Hugging Face's peft computes: its methods on a tiny OPT and a tiny Llama, outputs and gradients, in float64.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
    elsewhere/bin/python tests/reference/make_huggingface_peft_golden.py [opt | llama]

It needs an environment of its own, since their library and this repository share the import name `peft`; run it from
another folder than the repository's, or `import peft` finds the wrong one. The file it writes is committed, and
`tests/methods/test_against_huggingface.py` reads it.

All tensors are stored under this repository's names. OPT is a pre-norm decoder with learned positions and separate
query, key, value and output maps, so it is our Transformer but for the names (its position table has two rows in front
that are never used). The Llama has fewer heads for keys and values than for queries. There a prefix and a prompt meet
texts without padding: their library counts padding as positions between them and the text. And its norms have no bias,
which theirs would train beside the gain.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path = [path for path in sys.path if Path(path or ".").resolve() not in (FOLDER, FOLDER.parents[1])]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import peft  # noqa: E402

N, ROWS, LENGTH = 3, 3, 6
SIZES = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_NAMES = {
    "model.embed_tokens": "embedding.token",
    "model.norm": "norm",
    "model.layers": "blocks",
    "input_layernorm": "norm_attention",
    "post_attention_layernorm": "norm_feedforward",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "feedforward.gate",
    "mlp.up_proj": "feedforward.up",
    "mlp.down_proj": "feedforward.down",
}
NAMES = {
    "model.decoder.embed_tokens": "embedding.token",
    "model.decoder.embed_positions": "embedding.position",
    "model.decoder.final_layer_norm": "norm",
    "model.decoder.layers": "blocks",
    "self_attn_layer_norm": "norm_attention",
    "final_layer_norm": "norm_feedforward",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.out_proj": "attention.output",
    "fc1": "feedforward.up",
    "fc2": "feedforward.down",
    ".lora_A.default.weight": ".A",
    ".lora_B.default.weight": ".B",
    ".lora_magnitude_vector.default.weight": ".magnitude",
    ".ia3_l.default": ".scale",
    ".ln_tuning_layers.default.weight": ".delta_gain",
    "base_model.model.": "",
}
LINEARS = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
KV_WIDTH = {"opt": 16, "llama": 8}
NO_PADDING = {"opt": (), "llama": ("prefix", "prompt")}


def methods(family: str) -> dict:
    linears = LINEARS[family]
    scaled = {"target_modules": ["k_proj", "v_proj", linears[-1]], "feedforward_modules": linears[-1:]}
    found = {
        "lora": peft.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA),
        "lora all": peft.LoraConfig(target_modules=linears, **LORA),
        "lora rank-stabilised": peft.LoraConfig(target_modules=linears, use_rslora=True, **LORA),
        "dora": peft.LoraConfig(target_modules=linears, use_dora=True, **LORA),
        "ia3": peft.IA3Config(**scaled, init_ia3_weights=False),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    }
    return found if family == "opt" else found | {"ln_tuning": peft.LNTuningConfig(task_type="CAUSAL_LM")}


def our_name(name: str) -> str:
    for theirs, ours in (NAMES if "decoder" in name else LLAMA_NAMES | NAMES).items():
        name = name.replace(theirs, ours)
    return name


def base(family: str) -> transformers.PreTrainedModel:
    if family == "opt":
        config = transformers.OPTConfig(
            **SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=16, dropout=0.0,
            activation_function="relu", do_layer_norm_before=True, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            **SIZES, intermediate_size=24, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True
        )
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = "norm.weight" in name
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3 + gain)
    return model


def rms_norm(self, x: torch.Tensor) -> torch.Tensor:
    """Their formula, in the precision of x; theirs rounds to float32, whatever the model's is."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def our_tensors(name: str, values: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
    """One of their tensors (or its gradient) as ours; a prefix is cut into a key and a value for each layer."""
    if "prompt_encoder" not in name:
        ours = our_name(name)
        return {ours: values.reshape(-1) if ours.endswith((".scale", ".magnitude")) else values}
    if values.shape[1] == SIZES["hidden_size"]:
        return {"embedding.prompt": values}
    parts = values.view(N, SIZES["num_hidden_layers"], 2, width)
    return {
        f"blocks.{layer}.attention.{part}": parts[:, layer, index]
        for layer in range(SIZES["num_hidden_layers"])
        for index, part in enumerate(("key", "value"))
    }


def main(family: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, SIZES["vocab_size"], (ROWS, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) >= torch.tensor([[0], [2], [1]])  # padding on the left
    weights = torch.randn(ROWS, LENGTH, SIZES["vocab_size"], generator=generator, dtype=torch.float64) * mask[..., None]
    golden = {"tokens": tokens, "mask": mask, "weights": weights}
    for name, p in base(family).named_parameters():
        golden[f"base/{our_name(name)}"] = p[2:] if "embed_positions" in name else p
    for method, config in methods(family).items():
        model = peft.get_peft_model(base(family), config).double().eval()  # some of their tensors start as float32
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in trained.values():
                from_one = method in ("ia3", "ln_tuning")
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4 + from_one)
        real = torch.ones_like(mask) if method in NO_PADDING[family] else mask
        places = {} if family == "opt" or method in NO_PADDING[family] else {"position_ids": mask.long().cumsum(1) - 1}
        given = {"input_ids": tokens, "attention_mask": real.long(), **places}
        logits = model(**given, use_cache=method == "prefix").logits[:, -LENGTH:]
        (logits * weights).sum().backward()
        golden[f"{method}/logits"] = logits
        for name, p in trained.items():
            for kind, values in (("tensors", p), ("gradients", p.grad)):
                parts = our_tensors(name, values, KV_WIDTH[family])
                golden |= {f"{method}/{kind}/{ours}": part for ours, part in parts.items()}
    golden = {name: tensor.detach().clone().contiguous() for name, tensor in golden.items()}
    file = "huggingface_peft" if family == "opt" else f"huggingface_peft_{family}"
    save_file(golden, FOLDER / f"{file}.safetensors")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    record = {"versions": versions, "methods": list(methods(family))}
    (FOLDER / f"{file}.json").write_text(json.dumps(record) + "\n")
    print(f"{len(golden)} tensors, {sum(t.numel() * t.element_size() for t in golden.values()):,} bytes, {versions}")


if __name__ == "__main__":
    transformers.models.llama.modeling_llama.LlamaRMSNorm.forward = rms_norm
    for family in sys.argv[1:] or LINEARS:
        main(family)

"""What Hugging Face's peft computes: five methods on a tiny OPT with random weights, outputs and gradients, in float64.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
    elsewhere/bin/python tests/reference/make_huggingface_peft_golden.py

It needs an environment of its own, since their library and this repository share the import name `peft`; run it from
another folder than the repository's, or `import peft` finds the wrong one. The file it writes is committed, and
`tests/methods/test_against_huggingface.py` reads it.

All tensors are stored under this repository's names. OPT is a pre-norm decoder with learned positions and separate
query, key, value and output maps, so it is our Transformer but for the names (its position table has two rows in front
that are never used).
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
SIZES = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24}
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
    "base_model.model.": "",
}
LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
METHODS = {
    "lora": peft.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA),
    "lora all": peft.LoraConfig(target_modules=LINEARS, **LORA),
    "lora rank-stabilised": peft.LoraConfig(target_modules=LINEARS, use_rslora=True, **LORA),
    "dora": peft.LoraConfig(target_modules=LINEARS, use_dora=True, **LORA),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False
    ),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
}


def our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def base() -> transformers.OPTForCausalLM:
    config = transformers.OPTConfig(
        **SIZES, word_embed_proj_dim=16, max_position_embeddings=16, dropout=0.0, activation_function="relu",
        do_layer_norm_before=True, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3 + ("norm.weight" in name))
    return model


def our_tensors(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """One of their tensors (or its gradient) as ours; a prefix is cut into a key and a value for each layer."""
    if "prompt_encoder" not in name:
        ours = our_name(name)
        return {ours: values.reshape(-1) if ours.endswith((".scale", ".magnitude")) else values}
    if values.shape[1] == SIZES["hidden_size"]:
        return {"embedding.prompt": values}
    parts = values.view(N, SIZES["num_hidden_layers"], 2, SIZES["hidden_size"])
    return {
        f"blocks.{layer}.attention.{part}": parts[:, layer, index]
        for layer in range(SIZES["num_hidden_layers"])
        for index, part in enumerate(("key", "value"))
    }


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, SIZES["vocab_size"], (ROWS, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) >= torch.tensor([[0], [2], [1]])  # padding on the left
    weights = torch.randn(ROWS, LENGTH, SIZES["vocab_size"], generator=generator, dtype=torch.float64) * mask[..., None]
    golden = {"tokens": tokens, "mask": mask, "weights": weights}
    for name, p in base().named_parameters():
        golden[f"base/{our_name(name)}"] = p[2:] if "embed_positions" in name else p
    for method, config in METHODS.items():
        model = peft.get_peft_model(base(), config).double().eval()  # some of their tensors start as float32
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in trained.values():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4 + (method == "ia3"))
        logits = model(input_ids=tokens, attention_mask=mask.long(), use_cache=method == "prefix").logits
        logits = logits[:, -LENGTH:]
        (logits * weights).sum().backward()
        golden[f"{method}/logits"] = logits
        for name, p in trained.items():
            golden |= {f"{method}/tensors/{ours}": part for ours, part in our_tensors(name, p).items()}
            golden |= {f"{method}/gradients/{ours}": part for ours, part in our_tensors(name, p.grad).items()}
    golden = {name: tensor.detach().clone().contiguous() for name, tensor in golden.items()}
    save_file(golden, FOLDER / "huggingface_peft.safetensors")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    (FOLDER / "huggingface_peft.json").write_text(json.dumps({"versions": versions, "methods": list(METHODS)}) + "\n")
    print(f"{len(golden)} tensors, {sum(t.numel() * t.element_size() for t in golden.values()):,} bytes, {versions}")


if __name__ == "__main__":
    main()

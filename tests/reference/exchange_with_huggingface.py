"""Methods exchanged with Hugging Face's peft, both ways, through its own client: folders of ours that it loads, and
folders of its own that we load, with the same logits.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
    .venv/bin/python tests/reference/exchange_with_huggingface.py write folder
    elsewhere/bin/python tests/reference/exchange_with_huggingface.py answer folder
    .venv/bin/python tests/reference/exchange_with_huggingface.py read folder
    .venv/bin/python tests/reference/exchange_with_huggingface.py keep folder

The two environments cannot be one: both libraries are imported as `peft`. `write` saves tiny models by
`save_pretrained` and our methods on them by `to_huggingface`; `answer`, which needs neither of our packages, loads both
by `from_pretrained`, and saves methods of its own; `read` loads these by `from_huggingface`, and prints a table of the
largest difference of logits in each cell, or why it is refused. `keep` puts what the other library wrote into the
golden files that `tests/exchange/test_golden.py` reads.

The weights follow from names and shapes (`llama_shapes.weight`), so that they need not be kept.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from reference.llama_shapes import weight  # noqa: E402

GOLDEN = HERE / "huggingface_exchange"
BAR = 1e-5
N_WORDS = 23
TOKENS = (torch.arange(21).view(3, 7) * 8 + 3) % N_WORDS
SIZES = {"vocab_size": N_WORDS, "max_len": 16, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24}
LLAMA = {"position": "rotary", "norm_type": "rms", "gated": True, "activation": "silu", "bias": "none"}
BASES = {
    "llama": LLAMA | {"n_kv_heads": 2, "lm_head": "untied"},
    "bert": {"causal": False, "norm": "post", "n_segments": 2, "embedding_norm": True, "lm_head": "bert"},
    "gpt2": {"activation": "gelu_tanh"},
}
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def moved(tensors: dict[str, torch.Tensor]) -> None:
    """Away from the start, as training would, by amounts that follow from the names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.add_(0.25 * weight(name.replace("norm", "_"), tensor.shape))


def our_base(family: str):
    """The tiny model of a family."""
    from minitransformer import Transformer, TransformerConfig

    model = Transformer(TransformerConfig(**(SIZES | BASES[family]))).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(weight(name, tensor.shape))
    return model


def our_methods(family: str) -> dict:
    """By the name of the cell: recipes to attach one after the other."""
    from peft import ALL_LINEARS, IA3, DoRA, LoRA, PrefixTuning, PromptTuning, VeRA

    three = ("query", "key", "value")
    every = (*ALL_LINEARS, "gate") if family == "llama" else ALL_LINEARS
    found = {
        "LoRA": LoRA(rank=3, alpha=5, targets=three),
        "LoRA, query and value": LoRA(rank=3, alpha=5),
        "LoRA, all": LoRA(rank=3, alpha=5, targets=every),
        "LoRA, output and FFN": LoRA(rank=2, alpha=5, targets=("output", "up", "down")),
        "LoRA, layer 1": LoRA(rank=3, alpha=5, targets=three, layers=(1,)),
        "LoRA, B alone": LoRA(rank=3, alpha=5, targets=three, train=("B",)),
        "LoRA, A alone": LoRA(rank=3, alpha=5, targets=three, train=("A",)),
        "rsLoRA": LoRA(rank=3, alpha=5, rank_stabilized=True, targets=three),
        "DoRA": DoRA(rank=3, alpha=5, targets=three),
        "IA3": IA3(),
        "prefix": PrefixTuning(length=3),
        "prompt": PromptTuning(length=3),
        "VeRA": VeRA(rank=5, targets=("query", "value")),
    }
    found = {name: (recipe,) for name, recipe in found.items()}
    found["LoRA, ranks by pattern"] = LoRA(rank=2, alpha=5, targets=three), LoRA(rank=3, targets=("output",))
    if family == "llama":
        found["LoRA, head trained whole"] = (LoRA(rank=3, alpha=5, targets=three), ("head",))
    return found


def with_methods(family: str, entries: tuple):
    """The tiny model with recipes attached, and moved; a tuple of names among them is trained whole."""
    import peft

    model, train_also = our_base(family), next((entry for entry in entries if isinstance(entry, tuple)), ())
    for recipe in entries:
        if not isinstance(recipe, tuple):
            peft.attach(model, recipe, train_also=train_also)
    moved(peft.trainable_parameters(model))
    return model


def their_methods(family: str) -> dict:
    """Their configs by the name of the cell."""
    import peft

    task, linears = {"task_type": None if family == "bert" else "CAUSAL_LM"}, LINEARS[family]
    attention = linears[:1] if family == "gpt2" else linears[:3]
    lora = {"r": 3, "lora_alpha": 5, "fan_in_fan_out": family == "gpt2", **task}
    found = {
        "LoRA": peft.LoraConfig(target_modules=attention, **lora),
        "LoRA, all": peft.LoraConfig(target_modules=linears, **lora),
        "LoRA, output and FFN": peft.LoraConfig(target_modules=linears[len(attention) :], **lora),
        "LoRA, layer 1": peft.LoraConfig(target_modules=attention, layers_to_transform=[1], **lora),
        "rsLoRA": peft.LoraConfig(target_modules=attention, use_rslora=True, **lora),
        "DoRA": peft.LoraConfig(target_modules=attention, use_dora=True, **lora),
    }
    found["IA3"] = peft.IA3Config(**task)  # their default places
    if family == "bert":
        return found | {"VeRA": peft.VeraConfig(r=5, target_modules=["query", "value"], **task)}
    found["prompt"] = peft.PromptTuningConfig(num_virtual_tokens=3, **task)
    if family == "gpt2":
        return found | {"prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **task)}
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 4}, "alpha_pattern": {"q_proj": 7}}
    return found | {
        "LoRA, query and value": peft.LoraConfig(target_modules=["q_proj", "v_proj"], **lora),
        "LoRA, all-linear": peft.LoraConfig(target_modules="all-linear", **lora),
        "LoRA, ranks by pattern": peft.LoraConfig(target_modules=["q_proj", "v_proj"], **patterns, **lora),
        "LoRA, a pattern of targets": peft.LoraConfig(target_modules=r".*\.1\.self_attn\.(q|k)_proj", **lora),
        "LoRA, head trained whole": peft.LoraConfig(target_modules=attention, modules_to_save=["lm_head"], **lora),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **task),
        "VeRA": peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj"], **task),
    }


def write(folder: Path) -> None:
    """In our environment."""
    import peft
    from minitransformer.pretrained import save_pretrained

    said = {}
    for family in BASES:
        save_pretrained(our_base(family), folder / family)
        without = our_base(family)(TOKENS).detach()
        for cell, entries in our_methods(family).items():
            model, target = with_methods(family, entries), folder / "ours" / family / cell
            logits = model(TOKENS).detach()
            assert (logits - without).abs().max() > 0.01, f"{cell} changes nothing, so it would prove nothing"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                peft.to_huggingface(model, target)
            except ValueError as error:
                said[f"{family}: {cell}"] = f"refused: {error}"
            else:
                save_file({"logits": logits}, target / "expected.safetensors")
    (folder / "ours.json").write_text(json.dumps(said, indent=1))


@torch.no_grad()
def answer(folder: Path) -> None:
    """In an environment with Hugging Face's peft."""
    import peft

    said = json.loads((folder / "ours.json").read_text())
    for family in BASES:
        for target in sorted((folder / "ours" / family).iterdir()):
            expected = load_file(target / "expected.safetensors")["logits"]
            model = peft.PeftModel.from_pretrained(their_base(folder / family), target).eval()
            logits = model(input_ids=TOKENS).logits[:, -TOKENS.shape[1] :]
            said[f"{family}: {target.name}"] = float((logits - expected).abs().max())
        for cell, config in their_methods(family).items():
            target = folder / "theirs" / family / cell
            torch.manual_seed(0)
            model = peft.get_peft_model(their_base(folder / family), config).eval()
            moved({name: p for name, p in model.named_parameters() if p.requires_grad})
            model.save_pretrained(target)
            logits = model(input_ids=TOKENS).logits[:, -TOKENS.shape[1] :]
            save_file({"logits": logits.contiguous()}, target / "expected.safetensors")
    (folder / "answered.json").write_text(json.dumps(said, indent=1))


def their_base(folder: Path) -> torch.nn.Module:
    """What transformers makes of our `save_pretrained`."""
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder).eval()


@torch.no_grad()
def read(folder: Path) -> None:
    """In our environment."""
    import peft

    theirs_reads = json.loads((folder / "answered.json").read_text())
    we_read = {}
    for family in BASES:
        for target in sorted((folder / "theirs" / family).iterdir()):
            expected = load_file(target / "expected.safetensors")["logits"]
            try:
                model = peft.from_huggingface(our_base(family), target)
            except ValueError as error:
                we_read[f"{family}: {target.name}"] = f"refused: {error}"
            else:
                we_read[f"{family}: {target.name}"] = float((model(TOKENS) - expected).abs().max())
    wrong = []
    print(f"The largest difference of logits; bar {BAR:.0e}\n")
    print("| cell | they read ours | we read theirs |\n|---|---|---|")
    for cell in sorted({*theirs_reads, *we_read}):
        found = [side.get(cell, "") for side in (theirs_reads, we_read)]
        wrong += [cell] * any(isinstance(value, float) and not value <= BAR for value in found)
        print(f"| {cell} | {' | '.join(f'{v:.1e}' if isinstance(v, float) else v for v in found)} |")
    if wrong:
        sys.exit(f"above the bar: {'; '.join(wrong)}")


def keep(folder: Path) -> None:
    """Make the golden files of what the other library wrote, without the paths of a machine."""
    tensors, configs = {}, {}
    for target in sorted((folder / "theirs").glob("*/*")):
        cell = f"{target.parent.name}: {target.name}"
        configs[cell] = json.loads((target / "adapter_config.json").read_text())
        configs[cell]["base_model_name_or_path"] = f"tiny-{target.parent.name}"
        held = load_file(target / "adapter_model.safetensors") | load_file(target / "expected.safetensors")
        tensors |= {f"{cell}/{name}": tensor for name, tensor in held.items()}
    save_file(tensors, GOLDEN.with_suffix(".safetensors"))
    GOLDEN.with_suffix(".json").write_text(json.dumps(configs, sort_keys=True) + "\n")
    print(f"{len(configs)} folders of {sum(t.nbytes for t in tensors.values()):,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Methods exchanged with Hugging Face's peft.")
    parser.add_argument("what", choices=("write", "answer", "read", "keep"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.what in ("write", "read"):
        sys.path.insert(0, str(HERE.parents[1]))
    options.folder.mkdir(parents=True, exist_ok=True)
    {"write": write, "answer": answer, "read": read, "keep": keep}[options.what](options.folder)

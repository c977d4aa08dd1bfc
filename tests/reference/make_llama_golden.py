"""Write the golden files for `from_llama`: twenty tiny models of the Llama family, run by Hugging Face's own code.

Run it in an environment with transformers installed (it needs neither of our packages):

    python tests/reference/make_llama_golden.py

`huggingface_llama.safetensors` holds, by shape, the logits of a text, those of the same text with rows padded on the
left, a gradient of the latter, and the words that greedy generation adds. `huggingface_llama.json` holds the configs,
as config.json would. The weights are those of `llama_shapes.py`.
"""

import json
from pathlib import Path

import torch
import transformers
from llama_shapes import SHAPES, options, text, weight
from make_huggingface_golden import weighted_sum
from safetensors.torch import save_file

HERE = Path(__file__).parent
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}
LEARNS = "model.layers.0.self_attn.k_proj.weight"


def run(name: str) -> tuple[dict, dict]:
    """The config of one shape, and what the model computes."""
    kind, given = options(name)
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**given, pad_token_id=0)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor, p in model.named_parameters():
            p.copy_(weight(tensor, p.shape))
    tokens, real = text()
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    logits = model(tokens).logits
    padded = model(tokens, attention_mask=real.long(), position_ids=positions).logits
    weighted_sum(padded, real).backward()
    every = torch.ones_like(tokens)
    words = model.generate(tokens, attention_mask=every, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 7:]
    found = {"logits": logits, "padded": padded[real], "gradient": model.get_parameter(LEARNS).grad, "words": words}
    return config.to_dict(), {f"{name}/{key}": tensor.detach().clone() for key, tensor in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    configs, tensors = {}, {}
    for name in SHAPES:
        configs[name], found = run(name)
        tensors |= found
    save_file(tensors, HERE / "huggingface_llama.safetensors")
    record = {"transformers": transformers.__version__, "config": configs}
    (HERE / "huggingface_llama.json").write_text(json.dumps(record, indent=1) + "\n")

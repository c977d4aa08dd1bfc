"""The same methods against Hugging Face's peft on a tiny Llama with fewer heads for keys and values, in float64.

`tests/reference/make_huggingface_peft_golden.py` made the golden file, as the one for learned positions.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.position import rotary, rotated
from peft import ALL_LINEARS, IA3, DoRA, LNTuning, LoRA, PrefixTuning, PromptTuning

FOLDER = Path(__file__).resolve().parents[1] / "reference"
GOLDEN = load_file(FOLDER / "huggingface_peft_llama.safetensors")
METHODS = json.loads((FOLDER / "huggingface_peft_llama.json").read_text())["methods"]
N = 3  # length of their prefix and of their prompt
EVERY = (*ALL_LINEARS, "gate")
LLAMA = {"position": "rotary", "norm_type": "rms", "gated": True, "activation": "silu", "bias": "none"}
CONFIG = TransformerConfig(29, 16, d_model=16, n_heads=4, n_layers=2, d_ff=24, norm_eps=1e-6, n_kv_heads=2, **LLAMA)
RECIPES = {
    "lora": LoRA(rank=3, alpha=5),
    "lora all": LoRA(rank=3, alpha=5, targets=EVERY),
    "lora rank-stabilised": LoRA(rank=3, alpha=5, targets=EVERY, rank_stabilized=True),
    "dora": DoRA(rank=3, alpha=5, targets=EVERY),
    "ia3": IA3(),
    "prefix": PrefixTuning(length=N),
    "prompt": PromptTuning(length=N),
    "ln_tuning": LNTuning(),
}
TOKENS, MASK, WEIGHTS = GOLDEN["tokens"], GOLDEN["mask"], GOLDEN["weights"]


def group(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


def ours_of(name, tensor):
    """Their prefix lies before a text that starts at n, ours before one that starts at 0: theirs, turned back by n."""
    if not name.endswith("attention.key"):
        return tensor
    heads = tensor.view(1, N, 2, 4).transpose(1, 2)
    return rotated(heads, *rotary(torch.full((1, N), -N), 4, 10_000.0)).transpose(1, 2).reshape(N, 8)


def test_every_method_of_the_golden_file_is_compared():
    assert list(RECIPES) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_agree(method):
    model = Transformer(CONFIG).double().eval()
    model.load_state_dict(group("base/"))
    peft.attach(model, RECIPES[method])
    tensors, gradients = group(f"{method}/tensors/"), group(f"{method}/gradients/")
    if method == "prefix":
        tensors, gradients = ({n: ours_of(n, t) for n, t in own.items()} for own in (tensors, gradients))
    if method == "ln_tuning":  # what theirs trains is the whole gain
        tensors = {n: t - GOLDEN[f"base/{n.replace('delta_gain', 'weight')}"] for n, t in tensors.items()}
    peft.load_state_dict(model, tensors)
    by_position = method in ("prefix", "prompt")  # there they count padding as positions, so there is none
    real = torch.ones_like(MASK) if by_position else MASK
    tolerance = 1e-5 if by_position else 1e-9  # angles are rounded to float32, each position's in its own way
    logits = model(TOKENS, real)
    torch.testing.assert_close(logits[real], GOLDEN[f"{method}/logits"][real], rtol=0, atol=tolerance)
    (logits * WEIGHTS).sum().backward()
    trained = peft.trainable_parameters(model)
    assert gradients.keys() == trained.keys()
    for name, p in trained.items():
        assert gradients[name].norm() > 1e-3
        torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=10 * tolerance)

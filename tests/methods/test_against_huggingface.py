"""LoRA, DoRA, IA3, prefix and prompt tuning against Hugging Face's peft: the same numbers, outputs and gradients.

The golden file holds their results in float64 on a tiny OPT with random weights, left padding included;
`tests/reference/make_huggingface_peft_golden.py` made it, in an environment of its own.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peft
from minitransformer import Transformer, TransformerConfig
from peft import ALL_LINEARS, IA3, DoRA, LoRA, PrefixTuning, PromptTuning

FOLDER = Path(__file__).resolve().parents[1] / "reference"
GOLDEN = load_file(FOLDER / "huggingface_peft.safetensors")
METHODS = json.loads((FOLDER / "huggingface_peft.json").read_text())["methods"]
N = 3  # length of their prefix and of their prompt
CONFIG = TransformerConfig(
    vocab_size=29, max_len=16, d_model=16, n_heads=4, n_layers=2, d_ff=24, activation="relu", norm="pre"
)
RECIPES = {
    "lora": LoRA(rank=3, alpha=5),
    "lora all": LoRA(rank=3, alpha=5, targets=ALL_LINEARS),
    "lora rank-stabilised": LoRA(rank=3, alpha=5, targets=ALL_LINEARS, rank_stabilized=True),
    "dora": DoRA(rank=3, alpha=5, targets=ALL_LINEARS),
    "ia3": IA3(),
    "prefix": PrefixTuning(length=N),
    "prompt": PromptTuning(length=N),
}
TOKENS, MASK, WEIGHTS = GOLDEN["tokens"], GOLDEN["mask"], GOLDEN["weights"]


def group(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


def base(shift=0):
    """Their base model as ours; with `shift` the token at position p gets the vector of position p + shift."""
    model = Transformer(CONFIG).double().eval()
    weights = group("base/")
    weights["embedding.position.weight"] = weights["embedding.position.weight"].roll(-shift, dims=0)
    model.load_state_dict(weights)
    return model


def with_their_tensors(method, shift=0):
    model = peft.attach(base(shift), RECIPES[method])
    peft.load_state_dict(model, group(f"{method}/tensors/"))
    return model


def test_every_method_of_the_golden_file_is_compared():
    assert list(RECIPES) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_agree(method):
    model = with_their_tensors(method, shift=N if method == "prefix" else 0)
    logits = model(TOKENS, MASK)
    torch.testing.assert_close(logits[MASK], GOLDEN[f"{method}/logits"][MASK], rtol=0, atol=1e-9)
    (logits * WEIGHTS).sum().backward()
    gradients = group(f"{method}/gradients/")
    trained = peft.trainable_parameters(model)
    assert gradients.keys() == trained.keys()
    for name, p in trained.items():
        assert gradients[name].norm() > 1e-3
        torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=1e-9)


def test_their_prefix_moves_the_positions_of_the_text_and_ours_does_not():
    """By design: theirs counts the prefix as n tokens of the text's mask, so that the first word gets position n.

    A prefix is a cache of keys and values, and it has no place in the text, so ours starts at 0. Where the position
    table is moved by n rows, the two agree (the test above); as it is, they do not.
    """
    theirs = GOLDEN["prefix/logits"]
    ours = with_their_tensors("prefix")(TOKENS, MASK).detach()
    assert (ours - theirs)[MASK].abs().max() > 0.1
    moved = with_their_tensors("prefix", shift=N)(TOKENS, MASK).detach()
    assert (moved - theirs)[MASK].abs().max() < 1e-9


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_agrees_with_their_unmerged_outputs(method):
    model = peft.merge(with_their_tensors(method))
    torch.testing.assert_close(model(TOKENS, MASK)[MASK], GOLDEN[f"{method}/logits"][MASK], rtol=0, atol=1e-9)

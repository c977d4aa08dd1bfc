"""A prefix and a prompt in folders: theirs as a cache of past keys and values, and as further words."""

import pytest
import torch
from reference.exchange_models import READERS, TOKENS, built, classifier, logits, with_methods
from reference.their_form import read, state_dict, write

import peft
from minitransformer.cache import KVCache
from peft import PrefixTuning, PromptTuning

N, LAYERS, D_KV = 3, 2, 12
TABLE = {"llama": "model.embed_tokens", "bert": "bert.embeddings.word_embeddings", "gpt2": "transformer.wte"}


def behind(prompt_embeddings):
    """What theirs gives behind past keys and values: the text begins at position n."""
    model, cache = built("llama"), KVCache(LAYERS)
    parts = prompt_embeddings.view(N, LAYERS, 2, 2, D_KV // 2).permute(1, 2, 3, 0, 4)  # layer, k or v, head, n, d_head
    for layer, (key, value) in zip(cache.layers, parts, strict=True):
        layer.append(key[None].repeat(len(TOKENS), 1, 1, 1), value[None].repeat(len(TOKENS), 1, 1, 1))
    cache.n_keys = cache.n_tokens = N
    with torch.no_grad():
        return model(TOKENS, cache=cache)


def behind_words(family, prompt):
    """What theirs gives behind a prompt: one more row of the table for each of its vectors."""
    weights, config = state_dict(family)
    name = f"{TABLE[family]}.weight"
    changes = {name: torch.cat([weights[name], prompt])}
    n_words = config["vocab_size"] + len(prompt)
    for other in {"lm_head.weight", "cls.predictions.decoder.weight"} & weights.keys():
        changes[other] = torch.cat([weights[other], prompt if family != "llama" else 0 * prompt])
    for bias in {"cls.predictions.bias", "cls.predictions.decoder.bias"} & weights.keys():
        changes[bias] = torch.cat([weights[bias], torch.zeros(len(prompt))])
    model = READERS[family](weights | changes, config | {"vocab_size": n_words})
    words = torch.arange(config["vocab_size"], n_words).expand(len(TOKENS), -1)
    return logits(model, torch.cat([words, TOKENS], dim=1))[:, len(prompt) :, : config["vocab_size"]]


def test_their_prefix_is_ours_turned_by_its_length(tmp_path):
    model = with_methods(built("llama"), PrefixTuning(length=N))
    peft.to_huggingface(model, tmp_path / "folder")
    config, tensors = read(tmp_path / "folder")
    assert config["num_virtual_tokens"] == N and config["token_dim"] == D_KV and config["num_attention_heads"] == 2
    theirs = behind(tensors["prompt_embeddings"].float())
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-5)
    assert (theirs - logits(built("llama"))).abs().max() > 0.1
    again = peft.from_huggingface(built("llama"), tmp_path / "folder")
    before, after = peft.state_dict(model), peft.state_dict(again)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_prefix_in_a_classifier_which_theirs_cannot_run_is_refused(tmp_path):
    model = with_methods(classifier("llama"), PrefixTuning(length=N))
    with pytest.raises(ValueError, match="runs no prefix in a classifier of the Llama family; choose LoRA or a prompt"):
        peft.to_huggingface(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_prefix_of_theirs_is_read(tmp_path):
    given = torch.randn(N, LAYERS * 2 * D_KV, generator=torch.Generator().manual_seed(0))
    config = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM"}
    config |= {"num_virtual_tokens": N, "prefix_projection": True}
    model = peft.from_huggingface(built("llama"), write(tmp_path / "folder", config, {"prompt_embeddings": given}))
    torch.testing.assert_close(logits(model), behind(given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", TABLE)
def test_a_prompt_is_further_words_there_and_here(family, tmp_path):
    model = with_methods(classifier(family), PromptTuning(length=N))
    peft.to_huggingface(model, tmp_path / "folder")
    config, tensors = read(tmp_path / "folder")
    assert config["num_virtual_tokens"] == N and tensors.keys() == {"prompt_embeddings"}
    expected = behind_words(family, tensors["prompt_embeddings"])
    torch.testing.assert_close(logits(model.transformer), expected, rtol=0, atol=2e-5)
    again = peft.from_huggingface(classifier(family), tmp_path / "folder")
    assert torch.equal(again.transformer.embedding.prompt, model.transformer.embedding.prompt)

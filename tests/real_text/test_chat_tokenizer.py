import json
import pickle
import re
import sys
from pathlib import Path

import pytest
from reference.odd_texts import odd_texts
from reference.smollm2_digest import digest

from minitransformer.pretrained import smollm2_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "reference" / "smollm2.json").read_text())


def tokens_of(entry):
    return [int(token) for token in entry["tokens"].split()]


def test_fifty_texts_are_read_and_written_as_by_hugging_face(chat):
    assert len(GOLDEN["texts"]) == 50
    for entry in GOLDEN["texts"]:
        assert chat.encode(entry["text"]) == tokens_of(entry)
        assert chat.decode(tokens_of(entry)) == entry["decoded"]


def test_five_thousand_texts_are_read_as_by_hugging_face(chat):
    texts = odd_texts(5_000)
    digests = [GOLDEN["digests"][8 * i : 8 * i + 8] for i in range(len(texts))]
    assert [digest(chat.encode(text)) for text in texts] == digests


def test_conversations_are_those_of_the_files_own_template(chat):
    assert len(GOLDEN["conversations"]) == 14
    for entry in GOLDEN["conversations"]:
        more = entry["add_generation_prompt"]
        assert chat.chat_text(entry["messages"], add_generation_prompt=more) == entry["text"]
        assert chat.encode_chat(entry["messages"], add_generation_prompt=more) == tokens_of(entry)


def test_digits_stand_alone(chat):
    assert len(chat.encode("2024")) == 4
    assert [chat.decode([token]) for token in chat.encode("a\n\n1   2")] == ["a", "\n\n", "1", "   ", "2"]


def test_what_special_tokens_are(chat):
    assert chat.vocab_size == 49_152
    assert (chat.end_id, chat.pad_id) == (2, 2)
    tokens = chat.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokens.count(1) == tokens.count(2) == 2  # the system's turn and the user's
    assert chat.decode(tokens, skip_special_tokens=True).startswith("system\nYou are a helpful AI assistant")


def test_every_text_comes_back_whose_bytes_have_tokens(chat):
    """All but six control characters and those whose first byte is F1 or F2, where Unicode has nothing."""
    without = re.compile("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")
    texts = [text for text in odd_texts(1_000, seed=1) if not without.search(text)]
    assert len(texts) > 500
    for text in texts:
        assert chat.decode(chat.encode(text)) == text
    assert chat.encode("a\x04b") == chat.encode("a") + chat.encode("b")


def test_it_can_be_pickled(chat):
    again = pickle.loads(pickle.dumps(chat))
    messages = [{"role": "user", "content": "Where is Nora?"}]
    assert again.encode_chat(messages) == chat.encode_chat(messages)


@pytest.mark.parametrize(
    "messages", [[], "Hello!", ["Hello!"], [{"content": "Hello!"}], [{"role": "user", "content": 7}]]
)
def test_what_is_no_conversation_is_refused(chat, messages, unchecked):
    with pytest.raises(ValueError, match=r"conversation is a list of messages|a message has a \"role\""):
        chat.encode_chat(messages)


@pytest.mark.parametrize("package", ["tokenizers", "gguf"])
def test_without_a_package_the_command_is_named(chat, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        smollm2_tokenizer()

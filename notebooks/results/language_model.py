"""What tuning does to everything else: SmolLM2 untrained, with LoRA, with a prefix, and fully tuned.

    .venv/bin/python notebooks/results/language_model.py           about ten minutes on two cores

The runs are those of `python -m peft compare --task movers`, with its recipes and the rates that it has chosen, in 60
steps. Written to language_model.json, beside this file: what each model says to six test questions and to six others,
and its loss on other text; of a method also with the method detached.
"""

import json
from pathlib import Path

import torch

from minitransformer.pretrained import smollm2, smollm2_tokenizer
from minitransformer.tasks.dataset import Dataset, pad_rows
from minitransformer.tasks.language.pairs import ask
from minitransformer.tasks.language.rows import NOT_ASKED, answer_rows, generated_answers
from minitransformer.tasks.real.rotten_tomatoes import snippets
from minitransformer.training import answer_only, evaluate, next_token_loss
from peft import detach
from peft.experiments.compare import current, train
from peft.experiments.results import read_rows
from peft.experiments.sweep import chosen_learning_rate
from peft.experiments.tasks import FULL, LORA, PREFIX, TASKS, UNTRAINED

FILE = Path(__file__).with_suffix(".json")
STEPS, SEED = 60, 1
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Tell me something about elephants.",
    "Name three animals that can fly.",
    "What is 2 + 3?",
    "Why is the sky blue?",
)


def main() -> None:
    """All runs, one after the other; the file is written after each."""
    tokenizer, task = smollm2_tokenizer(), TASKS["movers"].splits()
    asked, others = task.test.pairs[:6], [ask(question, "") for question in QUESTIONS]
    untrained = smollm2()
    own = generated_answers(untrained, tokenizer, others, max_new_tokens=32)
    own = answer_rows(tokenizer, [ask(question, said) for question, said in zip(QUESTIONS, own, strict=True)])
    own.targets[own.targets == tokenizer.end_id] = NOT_ASKED  # some answers were cut short
    films, mask = pad_rows([tokenizer.encode(row.text.strip()) for row in snippets()[:64]], tokenizer.pad_id)
    texts = {
        "films": (Dataset(films, mask, torch.zeros(len(films), dtype=torch.long)), next_token_loss),
        "own answers": (own, answer_only),
    }

    def losses(model) -> dict[str, float]:
        """In nats per token, on each text."""
        return {name: evaluate(model, rows, objective, 16)["loss"] for name, (rows, objective) in texts.items()}

    def measured(model) -> dict:
        """What it says, how much of the test is right, and its losses."""
        return {
            "said": generated_answers(model, tokenizer, asked, max_new_tokens=24),
            "accuracy": task.accuracy(model, task.test),
            "others": generated_answers(model, tokenizer, others, max_new_tokens=32),
            "loss": losses(model),
        }

    runs = {UNTRAINED: measured(untrained)}
    rows = current(read_rows(FILE.with_name("movers.csv")), "movers")
    for name in (LORA, PREFIX, FULL):
        rate = chosen_learning_rate(rows, name)
        model, history = train(task, name, rate, STEPS, SEED)
        runs[name] = {"learning_rate": rate, "training_loss": history.loss, **measured(model)}
        if name != FULL:
            runs[name]["detached"] = losses(detach(model))
        asked_of = {"asked": [[pair.prompt[0]["content"], pair.answer] for pair in asked], "questions": QUESTIONS}
        stored = {"steps": STEPS, "batch_size": TASKS["movers"].batch_size, **asked_of, "runs": runs}
        FILE.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The longer runs of notebook 15: methods on SmolLM2, on the questions of `movers`, and what each of them forgets.

    .venv/bin/python notebooks/results/language_model.py           about half an hour on two cores

Every run has a process of its own, so its peak memory is its own. language_model.json, beside this file, gets a run as
soon as it is done; one that is there with the same settings is not repeated.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from minitransformer.pretrained import smollm2, smollm2_tokenizer
from minitransformer.tasks.dataset import Dataset, pad_rows
from minitransformer.tasks.language.movers import movers_splits
from minitransformer.tasks.language.pairs import ask
from minitransformer.tasks.language.rows import answer_rows, generated_answers
from minitransformer.tasks.real.rotten_tomatoes import snippets
from minitransformer.training import answer_only, evaluate, fit, next_token_loss
from minitransformer.training.objectives import autocasting
from peft import IA3, BottleneckAdapter, LoRA, PrefixTuning, PromptTuning, attach, disabled, parameter_table

FILE = Path(__file__).with_suffix(".json")
THREADS = 2
WORDS = "Here is a short story about people who move from one city to another. Where are they now?"
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How do I boil an egg?",
    "Name three animals that can fly.",
    "What is 2 + 3?",
    "Why is the sky blue?",
)


@dataclass(frozen=True)
class Run:
    """What decides a run; as text it is the settings that are stored."""

    method: object  # a recipe, or None: full fine-tuning, in float32
    learning_rate: float
    steps: int = 100
    batch_size: int = 16
    asked: str = "answer"  # or "answer without its end", "everything"


def runs(tokenizer) -> dict[str, Run]:
    """All runs by name; a prefix and a prompt start from real words."""
    words = tuple(tokenizer.encode(WORDS)[:16])
    return {
        "LoRA q,v r=8": Run(LoRA(rank=8, alpha=16.0), 1e-3),
        "prefix k,v n=16": Run(PrefixTuning(length=16, init_tokens=words), 5e-2),
        "soft prompt n=16": Run(PromptTuning(length=16, init_tokens=words), 5e-3),
        "Pfeiffer adapter m=16": Run(BottleneckAdapter(bottleneck=16, placement="pfeiffer"), 1e-3),
        "IA3": Run(IA3(), 1e-2),
        "full fine-tuning": Run(None, 1e-4),
        "LoRA, the end not asked for": Run(LoRA(rank=8, alpha=16.0), 1e-3, asked="answer without its end"),
        "LoRA, everything asked for": Run(LoRA(rank=8, alpha=16.0), 1e-3, asked="everything"),
    }


def targets_of(rows: Dataset, asked: str, end_id: int) -> Dataset:
    """The same rows, with that asked for."""
    targets = rows.targets
    if asked == "answer without its end":
        targets = targets.masked_fill(targets == end_id, -100)
    elif asked == "everything":
        following = torch.where(rows.padding_mask[:, 1:], rows.tokens[:, 1:], -100)
        targets = torch.nn.functional.pad(following, (0, 1), value=-100)
    return Dataset(rows.tokens, rows.padding_mask, targets)


def result(name: str) -> dict:
    """One run, measured."""
    torch.set_num_threads(THREADS)
    tokenizer, task = smollm2_tokenizer(), movers_splits()
    run = runs(tokenizer)[name]
    model = smollm2(torch.float32 if run.method is None else torch.bfloat16)
    films = Dataset(
        *pad_rows([tokenizer.encode(row.text.strip()) for row in snippets()[:64]], tokenizer.pad_id), torch.zeros(64)
    )
    asked = [ask(question, "") for question in QUESTIONS]
    said_before = generated_answers(model, tokenizer, asked, max_new_tokens=32, batch_size=1)
    own = answer_rows(tokenizer, [ask(q, said) for q, said in zip(QUESTIONS, said_before, strict=True)])
    own = targets_of(own, "answer without its end", tokenizer.end_id)  # some answers were cut short

    def losses() -> dict[str, float]:
        """In nats per token: on sentences of critics, and on what the untrained model answered to the questions."""
        objectives = {"films": (films, next_token_loss), "own answers": (own, answer_only)}
        cast = {text: (rows, autocasting(objective, torch.bfloat16)) for text, (rows, objective) in objectives.items()}
        return {text: evaluate(model, rows, objective, 16)["loss"] for text, (rows, objective) in cast.items()}

    before = losses()
    if run.method is not None:
        attach(model, run.method, seed=1)
    rows = targets_of(answer_rows(tokenizer, task.train), run.asked, tokenizer.end_id)
    history = fit(
        model, rows, steps=run.steps, batch_size=run.batch_size, learning_rate=run.learning_rate, schedule="linear",
        warmup=10, objective=answer_only, autocast=torch.bfloat16, seed=1, description=name,
    )  # fmt: skip
    memory = peak_mib()
    said = generated_answers(model, tokenizer, task.test, max_new_tokens=16)
    found = {
        "settings": repr(run),
        "trained": parameter_table(model).trained,
        "loss": [round(loss, 4) for loss in history.loss],
        "seconds_per_step": round(history.seconds_per_step, 3),
        "peak_mib": memory,
        "accuracy": task.accuracy(said, task.test),
        "said": said[:6],
        "questions": generated_answers(model, tokenizer, asked, max_new_tokens=32, batch_size=1),
        "before": before,
        "attached": losses(),
    }
    if run.method is not None:
        with disabled(model):
            found["detached"] = losses()
    return found


def peak_mib() -> int | None:
    """The most memory that this process held so far, where the system says it."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) // 1024 if status.exists() else None


def main() -> None:
    """Run what is missing, each run in a process of its own."""
    stored = json.loads(FILE.read_text()) if FILE.exists() else {"runs": {}}
    stored["versions"] = {"torch": torch.__version__, "python": platform.python_version(), "threads": THREADS}
    for name, run in runs(smollm2_tokenizer()).items():
        if stored["runs"].get(name, {}).get("settings") == repr(run):
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "run.json")
            subprocess.run([sys.executable, __file__, name, str(out)], check=True)
            stored["runs"][name] = json.loads(out.read_text())
        FILE.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        Path(sys.argv[2]).write_text(json.dumps(result(sys.argv[1])))
    else:
        main()

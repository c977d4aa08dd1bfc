"""The comparison on the toy tasks: every method, with a learning rate of its own, several seeds.

    python -m peft.compare --task sentiment --out notebooks/results/sentiment.csv
    python -m peft.compare --task qa --out notebooks/results/qa.csv

A comparison without a choice of learning rate for each method lies: what suits LoRA leaves a prefix where it started.
So each method first tries the rates of its grid in full runs with a seed of their own, judged on the validation split
(stage "choice"; shorter runs would favour the higher rate, whatever is best in the end); the best rate is then run with
every seed and scored once on the test split (stage "final"). Everything else (batch size, schedule, data order) is the
same for all.

On top of the methods come a row without any training (zero-shot), and, with `--random-backbone`, the same methods on a
frozen backbone that was never pretrained: what they then reach, they owe to the task alone.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minitransformer import Transformer
from minitransformer.pretrained import toy_backbone
from minitransformer.tasks import Task, qa_splits, sentiment_splits
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import History, Objective, answer_loss, evaluate, fit, predict, training_step
from peft.adapter import BottleneckAdapter
from peft.attach import attach, attached
from peft.bitfit import BitFit
from peft.checkpoint import save
from peft.counting import parameter_table
from peft.dora import DoRA
from peft.ia3 import IA3
from peft.lora import ALL_LINEARS, LoRA
from peft.lora_plus import lora_plus_groups
from peft.method import Method
from peft.prefix import PrefixTuning
from peft.prompt import PromptTuning
from peft.results import Row, read_rows, write_rows

TASKS = {"sentiment": sentiment_splits, "qa": qa_splits}
CHOICE_SEED = 0
SEEDS = (1, 2, 3)  # of the final runs


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: a method (None: full fine-tuning), its learning rates, its steps on each task.

    With `ratio`, every B of a LoRA learns that many times as fast as A (LoRA+).
    """

    method: Method | None
    learning_rates: tuple[float, ...]
    steps: dict[str, int]
    ratio: float | None = None


# What learns slowly gets more steps: above all prefixes, on questions whose answer takes two look-ups.
SHORT, MEDIUM = {"sentiment": 300, "qa": 600}, {"sentiment": 300, "qa": 1200}
HOULSBY, PREFIX, GATED = ({"sentiment": steps, "qa": more} for steps, more in ((300, 2400), (1200, 2400), (600, 4800)))
ZERO_SHOT = "zero-shot"
ENTRIES = {
    "full fine-tuning": Entry(None, (3e-4, 1e-3), MEDIUM),
    "LoRA q,v r=4": Entry(LoRA(rank=4, alpha=8), (2e-3, 5e-3), SHORT),
    "LoRA all r=4": Entry(LoRA(rank=4, alpha=8, targets=ALL_LINEARS), (2e-3, 5e-3), SHORT),
    "LoRA q,v r=4, B only": Entry(LoRA(rank=4, alpha=8, train=("B",)), (5e-3, 2e-2), SHORT),
    "LoRA q,v r=4, A only": Entry(LoRA(rank=4, alpha=8, train=("A",)), (5e-3, 2e-2), SHORT),
    "LoRA+ q,v r=4": Entry(LoRA(rank=4, alpha=8), (1e-3, 2e-3), SHORT, ratio=4.0),
    "rsLoRA q,v r=16": Entry(LoRA(rank=16, alpha=8, rank_stabilized=True), (2e-3, 5e-3), SHORT),
    "DoRA q,v r=4": Entry(DoRA(rank=4, alpha=8), (2e-3, 5e-3), SHORT),
    "Houlsby adapter m=8": Entry(BottleneckAdapter(bottleneck=8, placement="houlsby"), (5e-3, 1e-2), HOULSBY),
    "Pfeiffer adapter m=8": Entry(BottleneckAdapter(bottleneck=8, placement="pfeiffer"), (5e-3, 1e-2), MEDIUM),
    "parallel adapter m=8": Entry(BottleneckAdapter(bottleneck=8, placement="parallel"), (5e-3, 1e-2), MEDIUM),
    "adapter inside FFN m=4": Entry(BottleneckAdapter(bottleneck=4, placement="inside_ffn"), (5e-3, 1e-2), MEDIUM),
    "prefix k,v n=16": Entry(PrefixTuning(length=16), (3e-2, 5e-2), PREFIX),
    "gated prefix k,v n=32": Entry(PrefixTuning(length=32, gated=True), (5e-2, 1e-1), GATED),
    "prefix k,v n=16 by MLP": Entry(PrefixTuning(length=16, reparameterize=64), (1e-3, 3e-3), PREFIX),
    "prefix hidden n=16": Entry(PrefixTuning(length=16, at="hidden"), (1e-2, 3e-2), PREFIX),
    "soft prompt n=16": Entry(PromptTuning(length=16), (3e-2, 1e-1), PREFIX),
    "BitFit": Entry(BitFit(), (5e-3, 2e-2), MEDIUM),
    "IA3": Entry(IA3(), (1e-2, 5e-2), MEDIUM),
}
RANDOM_BACKBONE = ("LoRA all r=4", "Pfeiffer adapter m=8", "prefix hidden n=16")

KEY = ("task", "backbone", "method", "recipe", "stage", "learning_rate", "steps", "seed")
COLUMNS = (
    *KEY,
    "trained_parameters",
    "share",
    "validation_loss",
    "validation_accuracy",
    "test_accuracy",
    "test_by_kind",
    "seconds_per_step",
    "file_bytes",
    "threads",
    "torch_version",
    "machine",
)


def backbone(kind: str) -> Transformer:
    """The shipped backbone ("pretrained"), or one of its shape with fresh weights ("random")."""
    pretrained = toy_backbone()
    return pretrained if kind == "pretrained" else Transformer(pretrained.config, seed=12345)


def prepared(name: str, seed: int, backbone_kind: str = "pretrained") -> nn.Module:
    """A backbone with the method of that name attached, or wholly trainable for full fine-tuning.

    Raises:
        ValueError: the comparison has no method of that name.
    """
    if name not in ENTRIES:
        raise ValueError(f"the method {name!r} is unknown; choose one of {', '.join(ENTRIES)}")
    model, method = backbone(backbone_kind), ENTRIES[name].method
    return model.requires_grad_(True) if method is None else attach(model, method, seed=seed)


def train(
    name: str,
    task: Task,
    learning_rate: float,
    steps: int,
    seed: int,
    backbone_kind: str = "pretrained",
    progress: bool = True,
) -> tuple[nn.Module, History]:
    """One run of the comparison: the trained model (its last weights) and the history."""
    model, ratio = prepared(name, seed, backbone_kind), ENTRIES[name].ratio
    options = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "progress": progress, "description": name}
    if ratio is not None:
        options["optimizer"] = torch.optim.AdamW(lora_plus_groups(model, learning_rate, ratio), weight_decay=0.0)
    return model, fit(model, task.train, **options)


def by_kind(model: nn.Module, task: Task) -> dict[str, float]:
    """Test accuracy on each kind of row."""
    right = predict(model, task.test) == task.test.targets
    kinds = {kind: torch.tensor([own == kind for own in task.test.kinds]) for kind in task.kinds}
    return {kind: right[chosen].float().mean().item() for kind, chosen in kinds.items()}


def zero_shot(task: Task, backbone_kind: str = "pretrained") -> dict[str, float]:
    """Test accuracy of the backbone as it is: over all words, and restricted to the words that can be an answer."""
    model = backbone(backbone_kind)
    free, restricted = predict(model, task.test), predict(model, task.test, task.answer_ids.tolist())
    right = {"free": free == task.test.targets, "restricted": restricted == task.test.targets}
    return {name: values.float().mean().item() for name, values in right.items()}


def step_seconds(
    models: dict[str, nn.Module], batch: Dataset, objective: Objective = answer_loss, rounds: int = 7
) -> dict[str, float]:
    """Median time of a training step of each model, all on the same batch.

    The models take turns, so that whatever else the machine does in the meantime falls on all of them alike.
    """
    trainable = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(own, lr=1e-5) for name, own in trainable.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            model.train()
            began = time.perf_counter()
            training_step(model, batch, objective, optimizers[name], trainable[name], 1.0, number)
            seconds[name].append(time.perf_counter() - began)
    # The first step of each also makes the optimizer's state.
    return {name: statistics.median(own[1:]) for name, own in seconds.items()}


def file_bytes(model: nn.Module) -> int:
    """Size of what has to be kept: the method's file, or the whole model's weights."""
    if not attached(model):
        return sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "method.safetensors"))
        return Path(folder, "method.safetensors").stat().st_size


def planned(name: str, task: str, backbone_kind: str, stage: str, learning_rate: float, seed: int) -> Row:
    """What identifies a run: the columns of `KEY`, as they stand in the file."""
    entry = ENTRIES[name]
    values = {
        "task": task,
        "backbone": backbone_kind,
        "method": name,
        "recipe": "" if entry.method is None else str(entry.method),
        "stage": stage,
        "learning_rate": learning_rate,
        "steps": entry.steps[task],
        "seed": seed,
    }
    return {key: str(value) for key, value in values.items()}


def finished(key: Row, task: Task, progress: bool = True) -> Row:
    """Do a planned run: the whole row, as it stands in the file. Only a final run reads the test split."""
    rate, steps, seed = float(key["learning_rate"]), int(key["steps"]), int(key["seed"])
    model, history = train(key["method"], task, rate, steps, seed, key["backbone"], progress)
    validation, table = evaluate(model, task.validation), parameter_table(model)
    kinds = by_kind(model, task) if key["stage"] == "final" else {}
    return key | {
        "trained_parameters": str(table.trained),
        "share": f"{table.share:.6f}",
        "validation_loss": f"{validation['loss']:.4f}",
        "validation_accuracy": f"{validation['accuracy']:.4f}",
        "test_accuracy": f"{evaluate(model, task.test)['accuracy']:.4f}" if kinds else "",
        "test_by_kind": "; ".join(f"{kind} {value:.4f}" for kind, value in kinds.items()),
        "seconds_per_step": f"{history.seconds_per_step:.4f}",
        "file_bytes": str(file_bytes(model)),
        "threads": str(torch.get_num_threads()),
        "torch_version": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def chosen_learning_rate(rows: list[Row], name: str, backbone_kind: str) -> float:
    """The rate of the best "choice" run of a method, by validation accuracy, then by validation loss."""
    runs = [row for row in rows if (row["method"], row["backbone"], row["stage"]) == (name, backbone_kind, "choice")]
    if not runs:
        raise ValueError(f"no learning rate was tried for {name!r}; run the sweep first: python -m peft.compare")
    best = max(runs, key=lambda row: (float(row["validation_accuracy"]), -float(row["validation_loss"])))
    return float(best["learning_rate"])


def run(
    task_name: str,
    out: str | Path,
    names: tuple[str, ...] = tuple(ENTRIES),
    seeds: tuple[int, ...] = SEEDS,
    backbone_kind: str = "pretrained",
    progress: bool = True,
) -> list[Row]:
    """The whole sweep of one task, or what is missing of it in the file `out`; returns all rows of the file."""
    task = TASKS[task_name]()
    rows = read_rows(out, COLUMNS)
    for stage in ("choice", "final"):
        for key in _plan(stage, task_name, names, seeds, backbone_kind, rows):
            if not any(all(row[column] == key[column] for column in KEY) for row in rows):
                rows.append(finished(key, task, progress))
                write_rows(out, rows, COLUMNS)
    return rows


def _plan(stage, task_name, names, seeds, backbone_kind, rows) -> Iterator[Row]:
    """Seeds outside, methods inside: wherever the sweep stops, every method has had its turn."""
    if stage == "choice":
        for name in names:
            for rate in ENTRIES[name].learning_rates:
                yield planned(name, task_name, backbone_kind, stage, rate, CHOICE_SEED)
    else:
        for seed in seeds:
            for name in names:
                rate = chosen_learning_rate(rows, name, backbone_kind)
                yield planned(name, task_name, backbone_kind, stage, rate, seed)


def summaries(rows: list[Row], backbone_kind: str = "pretrained") -> list[dict]:
    """One record for each method with final runs: its rate, share, mean and spread over the seeds, time and size."""
    records = []
    for name in dict.fromkeys(row["method"] for row in rows):
        wanted = (name, backbone_kind, "final")
        final = [row for row in rows if (row["method"], row["backbone"], row["stage"]) == wanted]
        if not final:
            continue
        accuracy = torch.tensor([float(row["test_accuracy"]) for row in final], dtype=torch.float64)
        seconds = torch.tensor([float(row["seconds_per_step"]) for row in final])
        records.append(
            {
                "method": name,
                "learning_rate": float(final[0]["learning_rate"]),
                "steps": int(final[0]["steps"]),
                "trained": int(final[0]["trained_parameters"]),
                "share": float(final[0]["share"]),
                "mean": accuracy.mean().item(),
                "spread": accuracy.std().item() if len(final) > 1 else 0.0,
                "runs": len(final),
                "seconds_per_step": seconds.median().item(),
                "file_bytes": int(final[0]["file_bytes"]),
            }
        )
    return records


def percent(share: float) -> str:
    """A share with two digits after the point, or as many as a small one needs."""
    return f"{share:.2%}" if share >= 1e-4 else f"{100 * share:.1g}%"


def table(records: list[dict]) -> str:
    """The records as a Markdown table."""
    lines = [
        "| method | trained | share | learning rate | steps | test accuracy | file |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        lines.append(
            f"| {r['method']} | {r['trained']:,} | {percent(r['share'])} | {r['learning_rate']:g} | {r['steps']} "
            f"| {r['mean']:.2%} ± {r['spread']:.2%} ({r['runs']} seeds) | {r['file_bytes'] / 1024:,.0f} KiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Every PEFT method on a toy task, a learning rate chosen for each.")
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the CSV file; a sweep that was stopped goes on")
    parser.add_argument("--methods", nargs="+", default=list(ENTRIES), choices=list(ENTRIES), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the final runs")
    parser.add_argument("--random-backbone", action="store_true", help=f"only {', '.join(RANDOM_BACKBONE)}")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = "random" if options.random_backbone else "pretrained"
    names = tuple(options.methods)
    if kind == "random":
        names = tuple(name for name in names if name in RANDOM_BACKBONE)
    print(table(summaries(run(options.task, options.out, names, tuple(options.seeds), kind), kind)))


if __name__ == "__main__":
    main()

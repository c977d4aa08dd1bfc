"""Pretraining of the toy backbone, from nothing: next-token prediction on generated text.

    python -m minitransformer.training.pretrain                    the shipped file, in under half an hour
    python -m minitransformer.training.pretrain --steps 200 --out /tmp/short.safetensors

The curriculum has three stages. The first is rich in bare pairs, which make the model form its induction
circuit; the second practises the two steps from an object to its place; the third is rich in stories. The
step from one to the next is taken when the probes say that the circuit exists, not after a number of steps:
with the pairs gone too early, stories alone never form it.

Same machine, same number of threads: same bits.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from minitransformer.config import TransformerConfig
from minitransformer.pretrained.toy import BACKBONE
from minitransformer.tasks.toy.pretraining import pretraining_rows
from minitransformer.tasks.toy.probes import probe_scores
from minitransformer.tasks.toy.world import WORDS, world_vocabulary
from minitransformer.transformer import Transformer


@dataclass(frozen=True)
class Stage:
    """A mixture of documents, and the probe score at which the next stage begins."""

    mixture: dict[str, float]
    until: dict[str, float] = field(default_factory=dict)

    def is_over(self, scores: dict[str, float]) -> bool:
        """Whether every probe named in `until` has reached its score."""
        return bool(self.until) and all(scores[probe] >= score for probe, score in self.until.items())


CURRICULUM = (
    Stage(
        {"story": 0.30, "review": 0.20, "pairs": 0.24, "chains": 0.13, "inventory": 0.10, "facts": 0.03},
        until={"person": 0.85, "colour": 0.85, "holder": 0.80, "opinion": 0.85},
    ),
    Stage(
        {"story": 0.42, "review": 0.10, "pairs": 0.03, "chains": 0.14, "errands": 0.28, "facts": 0.03},
        until={"object": 0.90},
    ),
    Stage({"story": 0.60, "review": 0.15, "pairs": 0.02, "chains": 0.06, "errands": 0.14, "facts": 0.03}),
)
PROBE_ROWS = 500  # for each of the recorded probe scores


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside the machine."""

    steps: int = 6_500
    n_rows: int = 20
    length: int = 128  # the whole position table, so that every position is trained
    learning_rate: float = 2e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    probe_every: int = 250
    probe_rows: int = 250  # rows of each probe during the run; more rows make the gate less of a gamble
    seed: int = 0
    threads: int = 1

    def rate(self, step: int) -> float:
        """The learning rate at a step: linear warm-up, then a cosine down to 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def backbone_config() -> TransformerConfig:
    """The shape of the toy backbone. Embeddings start at unit variance; the logits are scaled to match."""
    return TransformerConfig(
        vocab_size=len(world_vocabulary()),
        max_len=128,
        logit_scale=128**-0.5,
        init="unit_embedding",
    )


def next_token_cross_entropy(model: Transformer, tokens: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """The mean cross-entropy of every token given those before it in its row."""
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Transformer, recipe: Recipe, n_rows: int = 100) -> float:
    """The loss on text of the last stage that no run with another held-out seed has seen."""
    vocabulary = world_vocabulary()
    mixture = CURRICULUM[-1].mixture
    rows = pretraining_rows(vocabulary, mixture, n_rows, recipe.length, seed=recipe.seed + 1_000_000, step=0)
    return next_token_cross_entropy(model, rows).item()


def pretrain(
    recipe: Recipe | None = None,
    steps: int | None = None,
    progress: bool = True,
    on_probe: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Transformer, list[dict[str, Any]]]:
    """Run the recipe, or only its first `steps` steps; return the model and its history.

    The history has one entry every 50 steps with `step`, `stage`, `loss` (mean of the 50) and, where the
    probes ran, `held_out_loss` and `probes`. The thread count is set for the run and put back.

    Raises:
        ValueError: `steps` is not between 1 and the recipe's number of steps.
    """
    recipe = recipe or Recipe()
    steps = recipe.steps if steps is None else steps
    if not 1 <= steps <= recipe.steps:
        raise ValueError(f"steps must be from 1 to {recipe.steps}, the length of the recipe, got {steps}")
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        return _run(recipe, steps, progress, on_probe)
    finally:
        torch.set_num_threads(threads)


def _run(recipe: Recipe, steps: int, progress: bool, on_probe) -> tuple[Transformer, list[dict[str, Any]]]:
    vocabulary = world_vocabulary()
    model = Transformer(backbone_config(), seed=recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    stage, losses, history = 0, [], []
    bar = {"desc": "pretraining", "file": sys.stdout, "ncols": 100, "mininterval": 0.5, "disable": not progress}
    for step in tqdm(range(steps), **bar):
        rows = pretraining_rows(
            vocabulary, CURRICULUM[stage].mixture, recipe.n_rows, recipe.length, seed=recipe.seed, step=step
        )
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = next_token_cross_entropy(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()

        losses.append(loss.item())
        if (step + 1) % 50 and step + 1 < steps:
            continue
        entry: dict[str, Any] = {"step": step + 1, "stage": stage + 1, "loss": sum(losses) / len(losses)}
        losses = []
        if (step + 1) % recipe.probe_every == 0 or step + 1 == steps:
            entry["held_out_loss"] = held_out_loss(model, recipe)
            entry["probes"] = probe_scores(model, n_rows=recipe.probe_rows)
            if CURRICULUM[stage].is_over(entry["probes"]):
                stage += 1
            if on_probe is not None:
                on_probe(entry)
        history.append(entry)
    return model, history


def write(model: Transformer, history: list[dict[str, Any]], recipe: Recipe, file: Path) -> None:
    """Write the weights to `file` (safetensors) and the record beside it (json)."""
    record = {
        "config": asdict(model.config),
        "words": WORDS,
        "recipe": {**asdict(recipe), "curriculum": [asdict(stage) for stage in CURRICULUM]},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "steps_run": history[-1]["step"],
        "held_out_loss": held_out_loss(model, recipe),
        "probes": probe_scores(model, n_rows=PROBE_ROWS),
        "probe_rows": PROBE_ROWS,
        "history": history,
    }
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrain the toy backbone from nothing.")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps of the recipe")
    parser.add_argument("--out", type=Path, default=BACKBONE, help="the weights; the record goes beside them")
    options = parser.parse_args()
    recipe = Recipe()
    model, history = pretrain(recipe, options.steps, on_probe=lambda entry: tqdm.write(json.dumps(entry)))
    write(model, history, recipe, options.out)
    print(f"wrote {options.out} and {options.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()

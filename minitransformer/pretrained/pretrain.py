"""Pretraining of the toy backbone, from nothing: next-token prediction on generated text.

    python -m minitransformer.pretrained.pretrain                    a new backbone, in under half an hour
    python -m minitransformer.pretrained.pretrain --steps 200 --out /tmp/short.safetensors

The curriculum has three stages. The first is rich in bare pairs, which make the model form its induction
circuit; the second practises the two steps from an object to its place; the third is rich in stories. The
step from one to the next is taken when the probes say that the circuit exists, not after a number of steps:
with the pairs gone too early, stories alone never form it.

Same machine, same number of threads: same bits. The record beside the shipped weights tells the run they come from.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minitransformer.config import TransformerConfig
from minitransformer.pretrained.toy import BACKBONE
from minitransformer.tasks.dataset import Dataset
from minitransformer.tasks.toy.pretraining import pretraining_rows
from minitransformer.tasks.toy.probes import probe_scores
from minitransformer.tasks.toy.world import WORDS, world_vocabulary
from minitransformer.training.evaluation import evaluate
from minitransformer.training.loop import fit
from minitransformer.training.objectives import next_token_loss
from minitransformer.training.plan import learning_rate_factor
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
ENTRY_EVERY = 50  # steps between two entries of the history


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside the machine."""

    steps: int = 6_500
    n_rows: int = 20
    length: int = 128  # the whole position table; its last row is the only one that never learns
    learning_rate: float = 2e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    probe_every: int = 250
    probe_rows: int = 250  # rows of each probe during the run; more rows make the gate less of a gamble
    seed: int = 0
    threads: int = 1


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
    return next_token_loss(model, _whole_rows(tokens)).loss


def held_out_loss(model: Transformer, recipe: Recipe, n_rows: int = 100) -> float:
    """The loss on text of the last stage that no run with another held-out seed has seen."""
    text = _text(len(CURRICULUM) - 1, n_rows, recipe.length, seed=recipe.seed + 1_000_000, step=0)
    return evaluate(model, text, next_token_loss)["loss"]


def pretrain(
    recipe: Recipe | None = None,
    steps: int | None = None,
    progress: bool = True,
    on_probe: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Transformer, list[dict[str, Any]]]:
    """Run the recipe, or only its first `steps` steps; return the model and its history.

    The history has an entry every 50 steps and wherever the probes ran, with `step`, `stage`, `loss` (the mean since
    the entry before) and, of the probes, `held_out_loss` and `probes`, which `on_probe` gets as they come. The thread
    count is set for the run and put back.

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
        model = Transformer(backbone_config(), seed=recipe.seed)
        curriculum = Curriculum(model, recipe, on_probe)
        losses = fit(
            model, curriculum, steps=steps, objective=next_token_loss, learning_rate=recipe.learning_rate,
            schedule=lambda step: learning_rate_factor(step, recipe.steps, recipe.warmup, "cosine"),
            betas=recipe.betas, weight_decay=recipe.weight_decay, clip=recipe.clip, seed=recipe.seed,
            progress=progress, description="pretraining",
        ).loss  # fmt: skip
        curriculum.probe(steps)
        return model, curriculum.history(losses)
    finally:
        torch.set_num_threads(threads)


class Curriculum:
    """The batch of each step of a run, for `fit`. When the probes of the model pass, the next stage begins."""

    def __init__(self, model: Transformer, recipe: Recipe, on_probe: Callable[[dict[str, Any]], None] | None = None):
        self.model, self.recipe, self.on_probe = model, recipe, on_probe
        self.stage = 0
        self.stages: list[int] = []  # of each step
        self.probed: dict[int, dict[str, Any]] = {}  # by the number of steps done

    def __call__(self, step: int) -> Dataset:
        if step and step % self.recipe.probe_every == 0:
            self.probe(step)
        self.stages.append(self.stage)
        return _text(self.stage, self.recipe.n_rows, self.recipe.length, seed=self.recipe.seed, step=step)

    def probe(self, done: int) -> None:
        """Ask the probes after so many steps, and go to the next stage if this one is over."""
        found = {
            "held_out_loss": held_out_loss(self.model, self.recipe),
            "probes": probe_scores(self.model, n_rows=self.recipe.probe_rows),
        }
        self.probed[done] = found
        if self.on_probe is not None:
            self.on_probe({"step": done, "stage": self.stage + 1, **found})
        if CURRICULUM[self.stage].is_over(found["probes"]):
            self.stage += 1

    def history(self, losses: list[float]) -> list[dict[str, Any]]:
        """The entries of the run, from the loss of each step."""
        entries, before = [], 0
        for done in sorted({*range(ENTRY_EVERY, len(losses) + 1, ENTRY_EVERY), *self.probed}):
            entry = {"step": done, "stage": self.stages[done - 1] + 1, "loss": mean(losses[before:done])}
            entries.append(entry | self.probed.get(done, {}))
            before = done
        return entries


def _text(stage: int, n_rows: int, length: int, seed: int, step: int) -> Dataset:
    mixture = CURRICULUM[stage].mixture
    return _whole_rows(pretraining_rows(world_vocabulary(), mixture, n_rows, length, seed=seed, step=step))


def _whole_rows(tokens: Int[Tensor, "B T"]) -> Dataset:
    """Rows without padding; their targets are their own words, so the ones of the data set are of no use."""
    return Dataset(tokens, torch.ones_like(tokens, dtype=torch.bool), tokens[:, -1])


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

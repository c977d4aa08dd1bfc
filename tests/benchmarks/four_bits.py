"""A training step of SmolLM2 over four bits beside the same step over float32: how long it takes, and what it holds.

    python tests/benchmarks/four_bits.py

LoRA r=8 on queries and values, 16 rows of 65 tokens, the last three of each asked for, AdamW; with and without gradient
checkpointing. Each turn starts a fresh process of each base, which loads the model, warms up, and takes the median of
its steps; its peak memory is all that it ever held, libraries and loading included. The bases take turns, which of them
begins changes. Not part of the tests: it takes some ten minutes of a quiet machine.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

BASES = ("float32", "nf4", "q4_1")
WARM_UP = 1


def measured(base: str, checkpointing: bool, steps: int, threads: int) -> dict[str, float]:
    """Median "seconds" of a step, and the "peak" of this process in MiB."""
    import torch
    from jobs import mebibytes
    from language_model import lora_step

    from minitransformer import quantize
    from minitransformer.pretrained import smollm2

    torch.set_num_threads(threads)
    model = smollm2(quantized=base == "q4_1")
    model.config = dataclasses.replace(model.config, gradient_checkpointing=checkpointing)
    if base == "nf4":
        quantize(model.requires_grad_(False))
    step, seconds = lora_step(model), []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[WARM_UP:]), "peak": mebibytes()}


def table(record: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Medians over the turns of each row and base, and their ratios to float32."""
    lines = [f"{'':32}{'seconds':>10}{'to float32':>12}{'MiB':>8}{'to float32':>12}"]
    for row, bases in record.items():
        middle = {
            base: {key: statistics.median(turn[key] for turn in turns) for key in ("seconds", "peak")}
            for base, turns in bases.items()
        }
        for base, own in middle.items():
            times, peaks = (own[key] / middle["float32"][key] for key in ("seconds", "peak"))
            lines.append(f"{row + ', ' + base:32}{own['seconds']:10.2f}{times:12.3f}{own['peak']:8.0f}{peaks:12.3f}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="fresh processes of each row and base")
    parser.add_argument("--steps", type=int, default=6, help="in each of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("BASE", "CHECKPOINTING"), help="be one of these processes")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one[0], options.one[1] == "True", options.steps, options.threads)))
        return
    own = [sys.executable, __file__, "--steps", str(options.steps), "--threads", str(options.threads), "--one"]
    record: dict[str, dict[str, list]] = {}
    for row, checkpointing in (("step", "False"), ("step, checkpointed", "True")):
        record[row] = {base: [] for base in BASES}
        for turn in range(options.turns):
            for base in BASES[:: -1 if turn % 2 else 1]:
                out = subprocess.run([*own, base, checkpointing], check=True, stdout=subprocess.PIPE, text=True).stdout
                record[row][base].append(json.loads(out.splitlines()[-1]))
    print(table(record))


if __name__ == "__main__":
    main()

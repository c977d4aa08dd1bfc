"""Our Transformer and methods beside Hugging Face's OPT and peft: the same shape, weights and batches, in one run.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
    python tests/benchmarks/against_huggingface.py --theirs elsewhere/bin/python

Or this code beside another checkout of the repository, before a change and after it:

    python tests/benchmarks/against_huggingface.py --before elsewhere/checkout

Theirs needs an environment of its own, since both libraries are imported as `peft`. Each round starts both sides anew,
and each job of a round has a fresh process of each side; the two take turns, so that what else the machine does falls
on both alike. Both run with the same settings of the C library's allocator. `speed.py` makes the table.
Not part of the tests: it takes some minutes of a quiet machine. With `--out notebooks/results/benchmark.json` it makes
the README's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))
# What a step frees stays with the process for the next: worth some percent to either side.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}  # bytes


class Worker:
    """A process that does jobs when it is asked to; see `jobs.py`."""

    def __init__(self, python: str, script: str, checkout: Path | str, threads: int, weights: Path):
        self.process = subprocess.Popen(
            [python, str(HERE / script), str(threads), str(weights)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=weights.parent,  # another folder than the repository's, where their `peft` would be ours
            env={**os.environ, **ALLOCATOR, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"},
        )
        self.hello = self.answer()

    def answer(self) -> dict:
        """The next line of JSON; whatever else a library prints is passed over."""
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args[1]} ended early; what it printed above says why")

    def ask(self, order: str, job: str) -> dict:
        """Send a request, and wait for its answer."""
        self.process.stdin.write(json.dumps({order: job}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Close the process."""
        self.process.stdin.close()
        self.process.wait()


def shared_weights(path: Path) -> None:
    """Random weights for both sides."""
    from ours import CONFIG
    from safetensors.torch import save_file

    from minitransformer import Transformer

    save_file(dict(Transformer(CONFIG, seed=0).state_dict()), path)


def measured(start: Callable[[], dict[str, Worker]], jobs: list[str], rounds: int, turns: int) -> dict[str, dict]:
    """The record of a run: "versions" of each side, and of each job and side the "seconds", turn by turn, and "memory".

    Args:
        start: new workers, one for each side, by its name.
        jobs: what to measure.
        rounds: fresh processes of each job and side.
        turns: times of each of them; which side begins changes with every turn.
    """
    seconds: dict[str, dict] = {job: {} for job in jobs}
    peaks: dict[str, dict] = {job: {} for job in jobs}
    progress = tqdm(total=rounds * len(jobs), leave=False)
    for _ in range(rounds):
        workers = start()
        for job in jobs:
            progress.set_description(job)
            present = [side for side, worker in workers.items() if "missing" not in worker.ask("prepare", job)]
            for turn in range(turns):
                for side in present[:: -1 if turn % 2 else 1]:
                    seconds[job].setdefault(side, []).append(workers[side].ask("run", job)["seconds"])
            for side in present:
                peaks[job].setdefault(side, []).append(workers[side].ask("end", job)["peak"])
            progress.update()
        for worker in workers.values():
            worker.end()
    progress.close()
    memory = {job: {side: {"peak": statistics.median(own)} for side, own in peaks[job].items()} for job in jobs}
    versions = {side: worker.hello["versions"] for side, worker in workers.items()}
    return {"versions": versions, "seconds": seconds, "memory": memory}


def main() -> None:
    """The command line."""
    from jobs import BATCH, LENGTH
    from ours import JOBS

    from peft.experiments import speed

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--theirs", help="the Python of an environment with torch, transformers, peft")
    other.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=4, help="fresh processes of each row and side")
    parser.add_argument("--turns", type=int, default=4, help="times in each of them, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these, separated by commas")
    parser.add_argument("--out", type=Path, help="a JSON file for all single times")
    options = parser.parse_args()
    rows = [job for job in JOBS if any(part in job.lower() for part in options.rows.lower().split(","))]
    ours = (sys.executable, "ours.py", REPOSITORY)
    if options.theirs:
        sides = {"ours": ours, "theirs": (os.path.abspath(options.theirs), "theirs.py", "")}
    else:
        sides = {"after": ours, "before": (sys.executable, "ours.py", options.before.resolve())}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.safetensors")
        shared_weights(weights)

        def start() -> dict[str, Worker]:
            return {side: Worker(*arguments, options.threads, weights) for side, arguments in sides.items()}

        record = measured(start, rows, options.rounds, options.turns)
    settings = {"pairs": options.rounds * options.turns, "rounds": options.rounds, "threads": options.threads}
    settings |= {"batch": BATCH, "length": LENGTH, **record.pop("versions"), "allocator": ALLOCATOR}
    record = {"sides": list(sides), "settings": settings, **record}
    print(f"\n{speed.table(record)}\n\n{settings}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

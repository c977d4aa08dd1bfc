"""Our Transformer and methods beside Hugging Face's OPT and peft: the same shape, weights and batches, in one run.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
    python tests/benchmarks/against_huggingface.py --theirs elsewhere/bin/python

Theirs needs an environment of its own, since both libraries are imported as `peft`. Two processes are held ready and
take turns, each turn through all jobs: what else the machine does falls on all alike. `speed.py` makes the table.
Not part of the tests: it takes some minutes of a quiet machine. With `--out notebooks/results/benchmark.json` it makes
the README's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))


class Worker:
    """A process that does jobs when it is asked to; see `jobs.py`."""

    def __init__(self, python: str, script: str, threads: int, weights: Path):
        command = [python, str(HERE / script), str(threads), str(weights)]
        # From another folder than the repository's, where their `peft` would be ours.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=weights.parent
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


def timed(workers: dict[str, Worker], jobs: list[str], pairs: int) -> dict[str, dict[str, list[float]]]:
    """The seconds of each job and side, turn by turn; which side begins changes with every turn.

    A turn does every job once, so that a machine that slows down for a minute slows all of them, and a job can be
    compared with its limit as well as with the other side.
    """
    seconds: dict[str, dict[str, list[float]]] = {job: {} for job in jobs}
    for job in tqdm(jobs, "warming up", leave=False):
        present = [side for side, worker in workers.items() if "missing" not in worker.ask("prepare", job)]
        seconds[job] = {side: [] for side in present}
    for pair in tqdm(range(pairs), "turns", leave=False):
        for job in jobs:
            for side in list(seconds[job])[:: 1 if pair % 2 else -1]:
                seconds[job][side].append(workers[side].ask("run", job)["seconds"])
    return seconds


def peaks(start: dict[str, tuple], job: str) -> dict[str, dict]:
    """The most memory of a fresh process of each side that does this job, in MiB."""
    found = {}
    for side, arguments in start.items():
        worker = Worker(*arguments)
        answer = worker.ask("peak", job)
        if "missing" not in answer:
            found[side] = answer
        worker.end()
    return found


def main() -> None:
    """The command line."""
    from jobs import BATCH, LENGTH, NEW_TOKENS
    from ours import JOBS

    from peft.experiments import speed

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--theirs", required=True, help="the Python of an environment with torch, transformers, peft")
    parser.add_argument("--pairs", type=int, default=15, help="turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", default="", help="only jobs whose name contains one of these, separated by commas")
    parser.add_argument("--out", type=Path, help="a JSON file for all single times")
    options = parser.parse_args()
    wanted = [job for job in JOBS if any(part in job for part in options.jobs.split(","))]
    pythons = {"ours": (sys.executable, "ours.py"), "theirs": (options.theirs, "theirs.py")}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.safetensors")
        shared_weights(weights)
        start = {side: (python, script, options.threads, weights) for side, (python, script) in pythons.items()}
        workers = {side: Worker(*arguments) for side, arguments in start.items()}
        versions = {side: worker.hello["versions"] for side, worker in workers.items()}
        seconds = timed(workers, wanted, options.pairs)
        for worker in workers.values():
            worker.end()
        memory = {job: peaks(start, job) for job in wanted if job.startswith("step: ")}
    settings = {"pairs": options.pairs, "threads": options.threads, "batch": BATCH, "length": LENGTH, **versions}
    record = {"settings": settings, "seconds": seconds, "memory": memory}
    print(f"\n{speed.table(record)}\n\n{settings}")
    for rows in (16, 1):
        for side, own in seconds.get(f"generate: {rows} row{'s' * (rows > 1)}", {}).items():
            speed_now = rows * NEW_TOKENS / statistics.median(own)
            print(f"generation, {rows} at a time, {side}: {speed_now:,.0f} tokens a second")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Our Transformer and methods beside Hugging Face's OPT and peft: the same shape, weights and batches, in one run.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
    python tests/benchmarks/against_huggingface.py --theirs elsewhere/bin/python

Theirs needs an environment of its own, since both libraries are imported as `peft`. Two processes are held ready, and
take turns, job by job: what else the machine does falls on both alike. The table shows medians, and the ratio of each
pair of neighbours as median and spread. Not part of the tests: it takes some minutes of a quiet machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
LIMIT = "step: limit"


class Worker:
    """A process that does jobs when it is asked to; see `jobs.py`."""

    def __init__(self, python: str, script: str, threads: int, weights: Path):
        command = [python, str(HERE / script), str(threads), str(weights)]
        # From another folder than the repository's, where their `peft` would be ours.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=weights.parent
        )
        self.answer()

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


def timed(workers: dict[str, Worker], job: str, pairs: int) -> dict[str, list[float]]:
    """The seconds of each side, turn by turn; which one begins changes with every pair."""
    present = {side: worker for side, worker in workers.items() if "missing" not in worker.ask("prepare", job)}
    seconds: dict[str, list[float]] = {side: [] for side in present}
    for pair in range(pairs):
        for side in list(present)[:: 1 if pair % 2 else -1]:
            seconds[side].append(present[side].ask("run", job)["seconds"])
    for worker in present.values():
        worker.ask("forget", job)
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return lower, median, upper


def row(job: str, seconds: dict[str, list[float]]) -> str:
    """A line of the table of times."""
    cells = []
    for side in ("ours", "theirs"):
        cells.append(f"{1e3 * statistics.median(seconds[side]):.1f}" if side in seconds else "–")
    if len(seconds) == 2:
        low, middle, high = quartiles([a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)])
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    else:
        cells.append("–")
    return f"| {job} | {' | '.join(cells)} |"


def main() -> None:
    """The command line."""
    from jobs import BATCH, LENGTH, NEW_TOKENS
    from ours import JOBS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--theirs", required=True, help="the Python of an environment with torch, transformers, peft")
    parser.add_argument("--pairs", type=int, default=15, help="turns of each job")
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
        print(f"{options.pairs} pairs, {options.threads} threads, batch {BATCH}, {LENGTH} tokens, times in ms\n")
        print("| job | ours | Hugging Face | ours / theirs (quartiles) |\n|---|---:|---:|---:|")
        times = {}
        for job in wanted:
            times[job] = timed(workers, job, options.pairs)
            print(row(job, times[job]), flush=True)
        for worker in workers.values():
            worker.end()
        peaks = {}
        steps = [job for job in wanted if job.startswith("step: ")]
        if steps:
            print("\n| most memory of a process, MiB | ours | Hugging Face | ours / theirs |\n|---|---:|---:|---:|")
        for job in steps:
            peaks[job] = {}
            for side, arguments in start.items():
                worker = Worker(*arguments)
                answer = worker.ask("peak", job)
                if "missing" not in answer:
                    peaks[job][side] = answer
                worker.end()
            cells = [f"{peaks[job][side]['peak']:.0f}" if side in peaks[job] else "–" for side in start]
            both = len(peaks[job]) == 2
            ratio = f"{peaks[job]['ours']['peak'] / peaks[job]['theirs']['peak']:.2f}" if both else "–"
            print(f"| {job} | {' | '.join(cells)} | {ratio} |", flush=True)
    if LIMIT in times:
        print()
        limit = statistics.median(times[LIMIT]["ours"])
        for job in steps:
            own = statistics.median(times[job]["ours"])
            print(f"{job}: {own / limit:.2f} of the limit, the frozen pass and a backward pass through activations")
    for rows in (16, 1):
        for side, seconds in times.get(f"generate: {rows} row{'s' * (rows > 1)}", {}).items():
            speed = rows * NEW_TOKENS / statistics.median(seconds)
            print(f"generation, {rows} rows, {side}: {speed:,.0f} tokens a second")
    if options.out:
        options.out.write_text(json.dumps({"seconds": times, "memory": peaks}, indent=1) + "\n")


if __name__ == "__main__":
    main()

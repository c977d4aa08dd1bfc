"""The benchmark's own parts: the protocol with a real worker, the turns, and the lines of its table."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import against_huggingface as benchmark  # noqa: E402
import jobs  # noqa: E402

from peft.experiments import speed  # noqa: E402


class Pretended:
    """A worker that takes a second, and another one for each run before."""

    def __init__(self, name, log, known=True):
        self.name, self.log, self.known, self.runs = name, log, known, 0

    def ask(self, order, job):
        self.log.append((self.name, order))
        if not self.known:
            return {"missing": "none"}
        self.runs += order == "run"
        return {"seconds": float(self.runs)} if order == "run" else {}


def test_the_sides_take_turns_and_change_who_begins():
    log = []
    workers = {"ours": Pretended("ours", log), "theirs": Pretended("theirs", log)}
    seconds = benchmark.timed(workers, ["a job", "another"], pairs=3)
    assert seconds["a job"] == {"ours": [1.0, 3.0, 5.0], "theirs": [1.0, 3.0, 5.0]}
    assert seconds["another"] == {"ours": [2.0, 4.0, 6.0], "theirs": [2.0, 4.0, 6.0]}
    runs = [name for name, order in log if order == "run"]
    assert runs == ["theirs", "ours"] * 2 + ["ours", "theirs"] * 2 + ["theirs", "ours"] * 2


def test_a_job_that_one_side_lacks_is_timed_on_the_other():
    workers = {"ours": Pretended("ours", []), "theirs": Pretended("theirs", [], known=False)}
    seconds = benchmark.timed(workers, ["a job"], pairs=2)["a job"]
    assert list(seconds) == ["ours"] and speed.ratio(seconds) is None


def test_the_table_has_medians_the_ratio_of_each_pair_the_limit_and_memory():
    record = {
        "seconds": {
            "step: LoRA": {"ours": [0.1, 0.2, 0.3], "theirs": [0.2, 0.2, 0.2]},
            "step: limit": {"ours": [0.1, 0.16, 0.2]},
            "forward": {"ours": [0.1, 0.1, 0.1], "theirs": [0.1, 0.2, 0.4]},
            "forward: 64 LoRAs": {"ours": [0.1, 0.1, 0.1]},
            "forward: limit": {"ours": [0.05, 0.08, 0.1]},
            "generate: 1 row": {"ours": [0.1, 0.1, 0.1]},
        },
        "memory": {"step: LoRA": {"ours": {"peak": 50.0}, "theirs": {"peak": 100.0}}},
    }
    assert speed.table(record).split("\n")[2:] == [
        "| step: LoRA | 200.0 | 200.0 | 1.00 (0.50 to 1.50) | 1.25 | 50 | 100 | 0.50 |",
        "| step: limit | 160.0 | – | – | 1.00 | – | – | – |",
        "| forward | 100.0 | 200.0 | 0.50 (0.25 to 1.00) | 1.25 | – | – | – |",
        "| forward: 64 LoRAs | 100.0 | – | – | – | – | – | – |",
        "| forward: limit | 80.0 | – | – | 1.00 | – | – | – |",
        "| generate: 1 row | 100.0 | – | – | – | – | – | – |",
    ]


def test_a_record_that_is_not_there_is_empty(tmp_path):
    assert speed.read(tmp_path / "none.json") == {}


def test_rows_of_mixed_lengths_end_at_the_right():
    mask = jobs.mixed_lengths()
    assert mask.shape == (jobs.BATCH, jobs.LENGTH) and mask[:, -1].all()
    assert mask.sum(dim=1).tolist()[0] == 16 and mask.sum(dim=1).tolist()[-1] == 128


def test_a_step_moves_what_is_trained_and_clears_its_gradient():
    weight = torch.ones(2, requires_grad=True)
    jobs.stepper(lambda: weight.square().sum(), [weight])()
    assert weight.grad is None and (weight < 1).all()


@pytest.mark.parametrize("seconds, times", [(0.15, 3), (0.5, 1)])
def test_a_short_job_is_done_until_enough_time_is_over(monkeypatch, seconds, times):
    now, done = [0.0], []
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: now[0])

    def job():
        done.append(True)
        now[0] += seconds

    assert jobs.timed(job) == pytest.approx(seconds) and len(done) == times


def test_a_worker_answers_and_every_job_of_ours_has_a_name(tmp_path):
    weights = tmp_path / "weights.safetensors"
    benchmark.shared_weights(weights)
    worker = benchmark.Worker(sys.executable, "ours.py", 1, weights)
    assert "missing" in worker.ask("prepare", "no such job")
    assert worker.ask("prepare", "attach LoRA q,v") == {}
    assert 0 < worker.ask("run", "attach LoRA q,v")["seconds"] < 10
    worker.end()
    assert worker.process.returncode == 0


def test_a_worker_that_dies_is_noticed(tmp_path):
    with pytest.raises(RuntimeError, match="ended early"):
        benchmark.Worker(sys.executable, "ours.py", "no number", tmp_path / "none")

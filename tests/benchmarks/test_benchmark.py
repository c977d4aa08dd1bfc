"""The benchmark's own parts: the protocol with a real worker, the turns, and the lines of its table."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import against_huggingface as benchmark  # noqa: E402
import jobs  # noqa: E402
import ours  # noqa: E402

from peft.experiments import speed  # noqa: E402


class Pretended:
    """A worker that takes a second, and another one for each run before, and a MiB for each job that it has begun."""

    def __init__(self, name, log, known=True):
        self.name, self.log, self.known, self.runs, self.begun = name, log, known, 0, 0
        self.hello = {"versions": f"{name} 1.0"}

    def ask(self, order, job):
        self.log.append((self.name, order, job))
        if not self.known:
            return {"missing": "none"}
        self.begun += order == "prepare"
        self.runs += order == "run"
        return {"prepare": {}, "run": {"seconds": float(self.runs)}, "end": {"peak": float(self.begun)}}[order]

    def end(self):
        self.log.append((self.name, "closed", None))


def test_the_sides_take_turns_and_change_who_begins():
    log = []
    record = benchmark.measured(
        lambda: {side: Pretended(side, log) for side in ("ours", "theirs")}, ["a job", "another"], rounds=2, turns=3
    )
    assert record["seconds"]["a job"] == {"ours": [1.0, 2.0, 3.0] * 2, "theirs": [1.0, 2.0, 3.0] * 2}
    assert record["seconds"]["another"] == {"ours": [4.0, 5.0, 6.0] * 2, "theirs": [4.0, 5.0, 6.0] * 2}
    assert record["memory"]["another"] == {"ours": {"peak": 2.0}, "theirs": {"peak": 2.0}}
    assert record["versions"] == {"ours": "ours 1.0", "theirs": "theirs 1.0"}
    one = ["prepare", "prepare", *["run"] * 6, "end", "end"]
    assert [order for _, order, _ in log] == (one * 2 + ["closed"] * 2) * 2
    runs = [name for name, order, job in log if order == "run" and job == "a job"]
    assert runs == ["ours", "theirs", "theirs", "ours", "ours", "theirs"] * 2


def test_a_job_that_one_side_lacks_is_timed_on_the_other():
    workers = {"ours": Pretended("ours", []), "theirs": Pretended("theirs", [], known=False)}
    record = benchmark.measured(lambda: workers, ["a job"], rounds=1, turns=2)
    assert record["seconds"]["a job"] == {"ours": [1.0, 2.0]} and record["memory"]["a job"] == {"ours": {"peak": 1.0}}
    assert speed.ratio(record["seconds"]["a job"]) is None


def test_the_table_has_medians_the_ratio_of_each_pair_the_limit_and_memory():
    record = {
        "seconds": {
            "plain loop: LoRA": {"ours": [0.1, 0.2, 0.3], "theirs": [0.2, 0.2, 0.2]},
            "step: limit": {"ours": [0.1, 0.16, 0.2]},
            "fit: prefix": {"ours": [0.2, 0.32, 0.5]},
            "fit: LoRA q,v, one answer a row": {"ours": [0.1, 0.1, 0.1]},
            "forward": {"ours": [0.1, 0.1, 0.1], "theirs": [0.1, 0.2, 0.4]},
            "forward: 64 LoRAs": {"ours": [0.1, 0.1, 0.1]},
            "forward: limit": {"ours": [0.05, 0.08, 0.1]},
            "generate: 1 row": {"ours": [0.1, 0.1, 0.1]},
        },
        "memory": {"plain loop: LoRA": {"ours": {"peak": 50.0}, "theirs": {"peak": 100.0}}},
    }
    assert speed.table(record).split("\n")[2:] == [
        "| plain loop: LoRA | 200.0 | 200.0 | 1.00 (0.50 to 1.50) | 1.25 | 50 | 100 | 0.50 |",
        "| step: limit | 160.0 | – | – | 1.00 | – | – | – |",
        "| fit: prefix | 320.0 | – | – | 2.00 | – | – | – |",
        "| fit: LoRA q,v, one answer a row | 100.0 | – | – | – | – | – | – |",
        "| forward | 100.0 | 200.0 | 0.50 (0.25 to 1.00) | 1.25 | – | – | – |",
        "| forward: 64 LoRAs | 100.0 | – | – | – | – | – | – |",
        "| forward: limit | 80.0 | – | – | 1.00 | – | – | – |",
        "| generate: 1 row | 100.0 | – | – | – | – | – | – |",
    ]


def test_the_table_of_a_change_compares_after_with_before():
    record = {
        "sides": ["after", "before"],
        "seconds": {
            "fit: LoRA": {"before": [0.2, 0.2], "after": [0.1, 0.1]},
            "step: limit": {"before": [0.1, 0.1], "after": [0.08, 0.08]},
        },
        "memory": {"fit: LoRA": {"before": {"peak": 100.0}, "after": {"peak": 75.0}}},
    }
    assert speed.table(record).split("\n") == [
        "| | after, ms | before, ms | after / before (quartiles) | of the limit | after, MiB | before, MiB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| fit: LoRA | 100.0 | 200.0 | 0.50 (0.50 to 0.50) | 1.25 | 75 | 100 | 0.75 |",
        "| step: limit | 80.0 | 100.0 | 0.80 (0.80 to 0.80) | 1.00 | – | – | – |",
    ]


def test_a_record_that_is_not_there_is_empty(tmp_path):
    assert speed.read(tmp_path / "none.json") == {}


def test_rows_of_mixed_lengths_end_at_the_right():
    mask = jobs.mixed_lengths()
    assert mask.shape == (jobs.BATCH, jobs.LENGTH) and mask[:, -1].all()
    assert mask.sum(dim=1).tolist()[0] == 16 and mask.sum(dim=1).tolist()[-1] == 128


def test_a_step_moves_what_is_trained_and_clears_its_gradient():
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    jobs.plain_loop(model, lambda: model.weight.exp().sum() + model.bias.sum())()
    assert model.weight.grad is None and (model.weight < before["weight"]).all()
    assert model.bias.grad is None and model.bias == before["bias"]


def test_the_plain_loss_is_that_of_our_objective_with_and_without_a_prompt(monkeypatch):
    model = ours.Transformer(ours.CONFIG, seed=0)
    batch = ours.full_batch()
    expected = ours.next_token_loss(model, batch).loss
    logits = model(batch.tokens)
    in_front = torch.cat([logits[:, :3] + 1, logits], dim=1)
    for own in (logits, in_front):
        torch.testing.assert_close(jobs.next_word_loss(own, batch.tokens), expected)


@pytest.mark.parametrize("seconds, times", [(0.15, 3), (0.5, 1)])
def test_a_short_job_is_done_until_enough_time_is_over(monkeypatch, seconds, times):
    now, done = [0.0], []
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: now[0])

    def job():
        done.append(True)
        now[0] += seconds

    assert jobs.timed(job) == pytest.approx(seconds) and len(done) == times


@pytest.mark.slow
def test_a_worker_answers_from_the_checkout_that_it_was_given(tmp_path):
    weights = tmp_path / "weights.safetensors"
    benchmark.shared_weights(weights)
    worker = benchmark.Worker(sys.executable, "ours.py", benchmark.REPOSITORY, 1, weights)
    assert "missing" in worker.ask("prepare", "no such job")
    for _ in range(2):  # each time in a process of its own
        assert worker.ask("prepare", "attach LoRA q,v") == {}
        assert 0 < worker.ask("run", "attach LoRA q,v")["seconds"] < 10
        assert 50 < worker.ask("end", "attach LoRA q,v")["peak"] < 5000
    worker.end()
    assert worker.process.returncode == 0
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/__init__.py").write_text("raise SystemExit('the given checkout')")
    with pytest.raises(RuntimeError, match="ended early"):
        benchmark.Worker(sys.executable, "ours.py", tmp_path, 1, weights)


@pytest.mark.parametrize("job", ours.JOBS)
def test_every_job_of_ours_can_be_done(job, monkeypatch):
    small = {"d_model": 16, "n_layers": 2, "d_ff": 32}
    for name, size in small.items():
        monkeypatch.setitem(jobs.SIZES, name, size)
    monkeypatch.setattr(ours, "base", lambda: ours.Transformer(dataclasses.replace(ours.CONFIG, **small)))
    ours.JOBS[job]()()


@pytest.mark.slow
def test_a_worker_that_dies_is_noticed(tmp_path):
    with pytest.raises(RuntimeError, match="ended early"):
        benchmark.Worker(sys.executable, "ours.py", benchmark.REPOSITORY, "no number", tmp_path / "none")

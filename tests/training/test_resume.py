"""A run that is killed at any moment and started again ends in the same bits as one that was never interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import fit, loop

CONFIG = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24, dropout=0.2)
RECIPES = {
    "lora": peft.LoRA(rank=2, dropout=0.3, targets=peft.ALL_LINEARS),
    "prefix with its mlp": peft.PrefixTuning(length=3, reparameterize=5),
    "houlsby": peft.BottleneckAdapter(bottleneck=4),
    "full fine-tuning": None,
}


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(23, (n, 6), generator=generator)
    mask = torch.arange(6) < torch.randint(2, 7, (n, 1), generator=generator)
    return Dataset(tokens, mask, tokens[:, 0])


TRAIN, VALIDATION = data(40, 1), data(10, 2)


def fresh(name):
    model = Transformer(CONFIG, seed=5)
    return model if RECIPES[name] is None else peft.attach(model, RECIPES[name], seed=6)


def train(name, checkpoint=None, model=None, **changes):
    """60 steps over 5 batches an epoch, with validation: the trained model and its history."""
    model = fresh(name) if model is None else model
    options = {"steps": 60, "batch_size": 8, "learning_rate": 0.02, "validate_every": 7, "seed": 3}
    options |= {"checkpoint": checkpoint, "every": 4 if checkpoint else None, "progress": False} | changes
    return model, fit(model, TRAIN, VALIDATION, **options)


def bits(model, history):
    """Everything that must come out the same; not the time it took."""
    kept = {key: value for key, value in vars(history).items() if key != "seconds"}
    return {name: p.detach().clone() for name, p in model.named_parameters()}, json.dumps(kept)


def assert_same(found, expected):
    assert found[1] == expected[1]
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name


@pytest.fixture(scope="module")
def uninterrupted():
    runs = {}

    class OnDemand:
        def __getitem__(self, name):
            return runs[name] if name in runs else runs.setdefault(name, bits(*train(name)))

    return OnDemand()


@pytest.mark.parametrize("name", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in [*RECIPES][1:])])
def test_writing_checkpoints_changes_nothing_and_a_finished_run_returns_at_once(name, uninterrupted, tmp_path):
    state = torch.get_rng_state()
    assert_same(bits(*train(name, tmp_path / "run")), uninterrupted[name])
    before = (tmp_path / "run").read_bytes()
    assert_same(bits(*train(name, tmp_path / "run")), uninterrupted[name])
    assert (tmp_path / "run").read_bytes() == before
    assert os.listdir(tmp_path) == ["run"]
    assert torch.equal(torch.get_rng_state(), state)


class Interruption(Exception):
    pass


def interrupt(patch, at):
    """Let a run stop at this step."""

    def interrupted(*arguments, step=loop.training_step):
        if arguments[6] == at:
            raise Interruption
        return step(*arguments)

    patch.setattr(loop, "training_step", interrupted)


# Around a checkpoint, in the middle and in the last step; each kind of run at two of these places.
PLACES = [("lora", 1), ("prefix with its mlp", 4), ("full fine-tuning", 59)]
PLACES += [
    pytest.param(name, at, marks=pytest.mark.slow)
    for name, at in [("houlsby", 5), *((name, 23 + number) for number, name in enumerate(RECIPES))]
]


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_an_exception_at_any_step_is_made_good(name, at, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt(patch, at)
        train(name, tmp_path / "run")
    assert_same(bits(*train(name, tmp_path / "run")), uninterrupted[name])


def test_the_optimizer_of_the_caller_resumes_too(tmp_path, monkeypatch):
    def run(checkpoint):
        model = fresh("lora")
        optimizer = torch.optim.SGD(peft.lora_plus_groups(model, 0.05), momentum=0.9)
        return train("lora", checkpoint, model, optimizer=optimizer, learning_rate=None)

    expected = bits(*run(None))
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt(patch, at=30)
        run(tmp_path / "run")
    assert_same(bits(*run(tmp_path / "run")), expected)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_twenty_five_random_sigkills(uninterrupted, tmp_path):
    """Each run is killed at random moments, wherever it is, until it gets through; then come the next ones."""
    chance, kills, finished = random.Random(0), 0, 0
    names, runs = list(RECIPES), 0
    while kills < 25 or finished < 4:
        name, path = names[runs % 4], tmp_path / f"run {runs}"
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                model, history = train(name, path, every=1)
                torch.save(bits(model, history), tmp_path / "done")
                os._exit(0)
            except BaseException:
                os._exit(1)
        if kills < 25:
            time.sleep(chance.uniform(0.0, 0.35))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 0, f"{name} did not resume"
        assert_same(torch.load(tmp_path / "done", weights_only=True), uninterrupted[name])
        finished, runs = finished + 1, runs + 1
    assert kills >= 25 and finished >= 4


FRESH_PROCESS = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
torch.set_num_threads(1)
from test_resume import bits, train
torch.manual_seed(int(sys.argv[5]))
print("started", flush=True)
torch.save(bits(*train("lora", sys.argv[3], every=1)), sys.argv[4])
"""


@pytest.mark.slow
def test_a_fresh_process_goes_on_where_a_killed_one_stopped(uninterrupted, tmp_path):
    root = Path(__file__).resolve().parents[2]
    run, done = tmp_path / "run", tmp_path / "done"
    for attempt in range(2):
        folders = [str(folder) for folder in (root, root / "tests" / "training", run, done)]
        command = [sys.executable, "-c", FRESH_PROCESS, *folders, str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "started\n"
            while attempt == 0 and not run.exists():
                time.sleep(0.001)
            if attempt == 0:
                process.kill()
            process.wait(timeout=120)
        assert done.exists() == (attempt == 1)
    assert_same(torch.load(done, weights_only=True), uninterrupted["lora"])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The file of a run of 60 steps."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train("lora", path)
    return path


@pytest.fixture
def run_file(finished_run, tmp_path):
    """A copy of it."""
    return Path(shutil.copy(finished_run, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 61}, "steps"),
        ({"batch_size": 4}, "batch_size"),
        ({"learning_rate": 0.03}, "another group.0.lr;"),
        ({"seed": 4}, "seed"),
        ({"weight_decay": 0.1}, "another group.0.weight_decay;"),
    ],
)
def test_another_setting_is_named_and_nothing_changes(run_file, changes, message):
    path = run_file
    model, before = fresh("lora"), path.read_bytes()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        train("lora", path, model, **changes)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert path.read_bytes() == before


def test_another_base_other_data_and_another_method_are_named(run_file):
    path = run_file
    options = {"steps": 60, "batch_size": 8, "learning_rate": 0.02, "validate_every": 7, "seed": 3}
    options |= {"checkpoint": path, "progress": False}
    other_base = peft.attach(Transformer(CONFIG, seed=9), RECIPES["lora"], seed=6)
    with pytest.raises(ValueError, match="frozen base"):
        fit(other_base, TRAIN, VALIDATION, **options)
    with pytest.raises(ValueError, match=r"another train\.tokens, train\.padding_mask, train\.targets;"):
        fit(fresh("lora"), data(40, 8), VALIDATION, **options)
    with pytest.raises(ValueError, match="list of trained tensors"):
        fit(fresh("houlsby"), TRAIN, VALIDATION, **options)


def test_a_damaged_file_is_refused_and_the_model_stays(run_file):
    path = run_file
    data, chance = path.read_bytes(), random.Random(1)
    model = fresh("lora")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number in range(40):
        broken = bytearray(data)
        if number % 2:
            broken = broken[: chance.randrange(len(data))]
        else:
            place = chance.randrange(len(data)) if number > 10 else number
            broken[place] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(broken))
        with pytest.raises(ValueError, match=r"delete it to start anew|belongs to a run with another"):
            train("lora", path, model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_the_last_file(tmp_path, monkeypatch):
    import minitransformer.files as files

    saved, replace = [], os.replace

    def full_after_three(*paths):
        if len(saved) == 3:
            raise OSError("no space left on device")
        saved.append(paths)
        return replace(*paths)

    monkeypatch.setattr(files.os, "replace", full_after_three)
    with pytest.raises(OSError, match="no space left"):
        train("lora", tmp_path / "run")
    monkeypatch.setattr(files.os, "replace", replace)
    assert os.listdir(tmp_path) == ["run"]
    assert_same(bits(*train("lora", tmp_path / "run")), bits(*train("lora")))


def test_a_link_stays_a_link_and_a_private_file_private(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "run", tmp_path / "run"
    link.symlink_to(target)
    train("lora", link, steps=8)
    assert link.is_symlink() and os.listdir(tmp_path / "elsewhere") == ["run"]
    target.chmod(0o600)
    train("lora", link, steps=8)
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("every", [0, -1])
def test_a_bad_interval_is_refused(tmp_path, every):
    with pytest.raises(ValueError, match="at least 1"):
        train("lora", tmp_path / "run", every=every)
    with pytest.raises(ValueError, match="it goes with a checkpoint file"):
        train("lora", None, every=5)


def test_the_gradient_reaches_no_tensor_of_a_merged_model_and_fit_says_so():
    model = peft.merge(fresh("lora"))
    with pytest.raises(ValueError, match="merged into the weights"):
        train("lora", None, model)


def test_the_prefix_folds_into_the_same_outputs_after_it_was_resumed(tmp_path):
    model, _ = train("prefix with its mlp", tmp_path / "run")
    again, _ = train("prefix with its mlp", tmp_path / "run")
    tokens, mask = VALIDATION.tokens, VALIDATION.padding_mask
    for one in (model, again):
        one.eval()
    with torch.no_grad():
        before = model(tokens, mask)
        assert torch.equal(again(tokens, mask), before)
        torch.testing.assert_close(peft.fold(again)(tokens, mask), before, rtol=1e-6, atol=1e-6)

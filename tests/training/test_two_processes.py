"""Two processes with half of each batch end where one process with all of it ends; files are written by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_processes.py")

pytestmark = pytest.mark.slow  # each starts processes


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict]:
    """What one process found, and what two did: for each case."""
    both = {}
    for n in (1, 2):
        folder = tmp_path_factory.mktemp(str(n))
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
        done = run([*start, str(SCRIPT), str(folder)])
        assert done.returncode == 0, done.stderr[-3000:]
        both[n] = torch.load(folder / "found.pt")
    return both


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    """Python with these arguments, on one thread a process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["lora", "prefix kv", "houlsby", "full"])
def test_two_processes_with_half_the_batch_equal_one(found, name):
    one, two = (found[n][f"trained, {name}"] for n in (1, 2))
    assert one["tensors"].keys() == two["tensors"].keys() and one["tensors"]
    for key, tensor in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], tensor, rtol=1e-6, atol=1e-6)
    for key in ("loss", "accuracy", "gradient_norm", "validation_loss", "validation_accuracy"):
        assert two["history"][key] == pytest.approx(one["history"][key], rel=1e-6), key
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-6)


def test_shares_are_every_second_row_and_sums_are_over_all(found):
    one, two = (found[n]["shares"] for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["rows"] == two["rows"] == 7
    assert (one["sum"], two["sum"]) == ([1, 2.5], [3, 5.0])
    assert torch.equal(two["first"], one["first"][: len(two["first"])])


@pytest.mark.parametrize("name", ["one row", "every second label"])
def test_a_process_without_rows_or_without_labels_changes_nothing(found, name):
    one, two = (found[n]["few"][name] for n in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert two["validation"] == pytest.approx(one["validation"], rel=1e-9)
    for key, tensor in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], tensor, rtol=1e-6, atol=1e-6)


def test_a_run_of_two_that_is_stopped_goes_on(found):
    tensors = found[2]["checkpoint"]["tensors"]
    for name, tensor in tensors["whole"].items():
        assert torch.equal(tensors["in two"][name], tensor)


@pytest.mark.parametrize("name", ["lora all", "prefix kv", "houlsby"])
def test_a_frozen_base_cut_into_shards_trains_the_same(found, name):
    """FSDP2's `fully_shard`: each process keeps half of every tensor, and the runs agree."""
    one, two = (found[n][f"sharded, {name}"] for n in (1, 2))
    assert one["kept"] == one["whole"] and two["kept"] <= 0.55 * two["whole"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for key, tensor in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["full", "lora", "prefix kv", "houlsby"])
def test_what_the_processes_exchange_is_the_gradients_of_trained_numbers_only(found, name):
    own = found[2][f"bytes, {name}"]
    assert own["moved"] == 4 * own["trained"]


def test_the_command_line_is_shared_by_two_and_leaves_one_file(tmp_path):
    start = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(SCRIPT.with_name("short_runs.py")),
    ]
    words = ["compare", "--task", "sentiment", "--methods", "BitFit", "--examples", "4", "--seeds", "1"]
    done = run([*start, *words, "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("runs to do") == done.stdout.count("| BitFit |") == 1
    (text,) = [path.read_text() for path in tmp_path.glob("*.csv")]
    assert text.count("2 processes") == 3 and text.count(",final,") == 1

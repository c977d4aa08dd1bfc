"""The cost model of many machines: against hand-made numbers, its own limits, and two processes on this machine."""

import subprocess
import sys

import pytest

from peft.experiments import scaling
from peft.experiments.scaling import Link, Step

LINK = Link(latency=1e-3, bandwidth=1e6, measured=False)
STEP = Step(seconds=8.0, weights=1000, trained=250, activation_bytes=4096)


def test_by_hand_for_four_processes():
    """Each sends 2 * 3/4 * 1000 bytes, in six messages."""
    assert scaling.ring_bytes(250, 4) == 1500
    assert scaling.exchange_seconds(250, 4, LINK) == pytest.approx(6e-3 + 1.5e-3)
    assert scaling.step_seconds(STEP, 4, LINK) == pytest.approx(2 + 7.5e-3)
    assert scaling.memory_bytes(STEP, 4) == 4000 + 3000 + 1024


def test_one_process_exchanges_nothing():
    assert scaling.ring_bytes(250, 1) == scaling.exchange_seconds(250, 1, LINK) == 0
    assert scaling.step_seconds(STEP, 1, LINK) == STEP.seconds


def test_the_bytes_of_each_process_tend_to_twice_the_gradients():
    sent = [scaling.ring_bytes(10**6, n) for n in (2, 4, 64, 1024)]
    assert sent == sorted(sent) and sent[0] == 4e6 and 7.9e6 < sent[-1] < 8e6


def test_it_says_what_was_measured():
    words = scaling.provenance(STEP, LINK)
    assert (words["compute"], words["bandwidth"]) == ("measured", "assumed")
    words = scaling.provenance(Step(1.0, 1, 1, 1, measured=False), Link(1.0, 1.0, measured=True))
    assert (words["compute"], words["bandwidth"]) == ("assumed", "measured")


@pytest.mark.parametrize("n", [2, 4])
def test_the_link_is_found_again_from_times_it_would_give(n):
    times = {size: scaling.exchange_seconds(size // 4, n, LINK) for size in (4, 10**6, 10**8)}
    found = scaling.fitted_link(times, n)
    assert found.measured and found.bandwidth == pytest.approx(1e6) and found.latency == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("times", [{4: 1.0}, {4: 1.0, 8: 1.0}])
def test_times_that_give_no_bandwidth_are_refused(times):
    with pytest.raises(ValueError, match="measure again"):
        scaling.fitted_link(times, 2)


@pytest.mark.slow
def test_two_processes_measure_their_link(monkeypatch):
    found = scaling.measured_link()
    assert found.measured and 1e-7 < found.latency < 1 and 1e6 < found.bandwidth < 1e12


@pytest.mark.slow
def test_alone_there_is_nothing_to_measure():
    done = subprocess.run([sys.executable, "-m", "peft.experiments.scaling"], capture_output=True, text=True)
    assert done.returncode == 1 and "torchrun --nproc-per-node 2" in done.stderr

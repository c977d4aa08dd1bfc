"""The language model's benchmark: every side has every row, and a token of generation is what one more costs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import language_model as benchmark


def test_each_row_is_there_on_each_side():
    wanted = {*benchmark.STEPS, *benchmark.TOKENS, *(benchmark.FIRST + row for row in benchmark.TOKENS)}
    assert set(benchmark.our_jobs("")) == set(benchmark.limit_jobs("")) == wanted


def test_the_limit_counts_each_weight_of_the_model():
    products = sum(d_out * d_in for d_out, d_in in benchmark.LAYER) * benchmark.SIZES["num_hidden_layers"]
    norms = (2 * 30 + 1) * 576
    assert products + 49_152 * 576 + norms == 134_515_008


def test_a_token_is_what_the_others_take_beside_the_first():
    row, sides = benchmark.TOKENS[0], ["ours", "theirs", "limit"]
    seconds = {benchmark.FIRST + row: {"ours": [0.1], "theirs": [0.2], "limit": [0.05]}}
    seconds[row] = {"ours": [0.1 + 31 * 0.03], "theirs": [0.2 + 31 * 0.04], "limit": [0.05 + 31 * 0.025]}
    memory = {row: {side: {"peak": peak} for side, peak in zip(sides, (300.0, 400.0, 100.0), strict=True)}}
    line = benchmark.table(seconds, memory, sides).splitlines()[1]
    values = [float(cell) for cell in line.removeprefix(row).split()]
    assert values == pytest.approx([30.0, 40.0, 25.0, 0.75, 1.2, 300, 0.75])


def test_a_step_is_also_compared_with_labels_everywhere():
    everywhere, asked, *_ = benchmark.STEPS
    seconds = {everywhere: {"ours": [2.0], "theirs": [4.0]}, asked: {"ours": [2.0], "theirs": [2.5]}}
    memory = {job: {side: {"peak": 1.0} for side in own} for job, own in seconds.items()}
    assert benchmark.table(seconds, memory, ["ours", "theirs"]).endswith("float32, asked positions 0.500")

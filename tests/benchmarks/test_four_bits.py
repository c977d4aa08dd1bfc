"""The four-bit benchmark's table: medians over the turns, and each base beside float32."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import four_bits as benchmark
from language_model import ASKED, LENGTH, ROWS, asked_batch


def test_each_base_is_compared_with_float32_by_its_median():
    turns = {"float32": [(2.0, 1000.0), (4.0, 900.0), (2.2, 1000.0)], "nf4": [(2.2, 600.0), (2.2, 700.0), (9.0, 600.0)]}
    record = {base: [{"seconds": s, "peak": peak} for s, peak in own] for base, own in turns.items()}
    _, *lines = benchmark.table({"step": record}).splitlines()
    values = [[float(cell) for cell in line.partition(", ")[2].split()[1:]] for line in lines]
    assert values == [pytest.approx([2.2, 1.0, 1000, 1.0]), pytest.approx([2.2, 1.0, 600, 0.6])]


def test_the_last_words_of_each_row_are_asked_for():
    batch = asked_batch()
    asked = batch.targets != -100
    assert batch.tokens.shape == (ROWS, LENGTH) and asked.sum() == ROWS * ASKED
    rows, positions = asked.nonzero(as_tuple=True)
    assert (batch.targets[asked] == batch.tokens[rows, positions + 1]).all() and positions.max() == LENGTH - 2

"""Result files, and the README's table that is made from them."""

import json
import os

import pytest

from peft.experiments import report
from peft.experiments.compare import COLUMNS
from peft.experiments.results import read_rows, write_rows


def row(task, method="LoRA q,v r=4", seed=1, accuracy="0.9000", backbone="pretrained"):
    values = dict.fromkeys(COLUMNS, "")
    return values | {
        "task": task, "backbone": backbone, "method": method, "stage": "final", "learning_rate": "0.005",
        "steps": "600", "seed": str(seed), "trained_parameters": "8192", "share": "0.009896",
        "test_accuracy": accuracy, "seconds_per_step": "0.1", "file_bytes": "34000",
    }  # fmt: skip


def test_what_is_written_is_read_back(tmp_path):
    rows = [row("qa", 'a "quoted", name'), row("qa", seed=2)]
    path = tmp_path / "new" / "folder" / "rows.csv"
    write_rows(path, rows[:1], COLUMNS)
    write_rows(path, rows, COLUMNS)
    assert read_rows(path, COLUMNS) == rows
    assert os.listdir(path.parent) == ["rows.csv"]
    assert read_rows(tmp_path / "none.csv", COLUMNS) == []


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a results file of this command"):
        read_rows(tmp_path / "other.csv", COLUMNS)
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    write_rows(path, [row("qa")], COLUMNS)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_rows(path, [row("qa"), row("qa", seed=2)], COLUMNS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.csv"]


@pytest.fixture
def results(tmp_path):
    """Two seeds on each task, and one run on a random backbone."""
    for task, accuracies in (("sentiment", ("1.0000", "0.9800")), ("qa", ("0.9000", "0.9200"))):
        rows = [row(task, seed=seed, accuracy=accuracy) for seed, accuracy in enumerate(accuracies)]
        rows.append(row(task, accuracy="0.5000", backbone="random"))
        write_rows(tmp_path / f"{task}.csv", rows, COLUMNS)
    return tmp_path


def test_the_report_has_a_line_for_each_method(results):
    lines = report.report(results).splitlines()
    assert lines[2] == "| LoRA q,v r=4 | 8,192 | 0.99% | 99.0% ± 1.4% (2 seeds) | 91.0% ± 1.4% (2 seeds) |"
    assert lines[3] == ("| LoRA q,v r=4, random backbone | 8,192 | 0.99% | 50.0% (1 seed) | 50.0% (1 seed) |")
    assert len(lines) == 4


def test_a_method_that_was_not_run_is_not_hidden(results):
    write_rows(results / "qa.csv", [row("qa", "another")], COLUMNS)
    table = report.report(results)
    assert "| LoRA q,v r=4 | 8,192 | 0.99% | 99.0% ± 1.4% (2 seeds) | not run |" in table


def test_without_result_files_the_cure_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing or empty; run: python -m peft compare --task sentiment"):
        report.report(tmp_path)


def test_the_table_goes_between_its_markers_and_nothing_else_changes():
    text = f"head\n{report.START}\nold\n{report.END}\ntail\n"
    once = report.written_into(text, "new")
    assert once == f"head\n{report.START}\nnew\n{report.END}\ntail\n"
    assert report.written_into(once, "new") == once
    with pytest.raises(ValueError, match="has lost its markers"):
        report.written_into("no markers here", "new")


def test_real_text_has_a_table_of_its_own_with_a_column_for_each_task(results):
    columns = [column for column in COLUMNS if column != "test_by_kind"]

    def written(task, *methods):
        rows = [row(task, method=method, seed=1, accuracy="0.8") for method in methods]
        write_rows(results / f"{task}.csv", [{c: own[c] for c in columns} for own in rows], columns)

    written("rotten_tomatoes", "head only", "LoRA q,v r=8")
    written("quiz", "LoRA q,v r=8")
    table = report.report(results).splitlines()[-4:]
    assert table == [
        "| method | share | Rotten Tomatoes, held-out films | Quiz clues with four answers, held-out shows |",
        "|---|---:|---:|---:|",
        "| head only | 0.99% | 80.0% (1 seed) | – |",
        "| LoRA q,v r=8 | 0.99% | 80.0% (1 seed) | 80.0% (1 seed) |",
    ]
    written("reuters_r8", "head only")
    assert report.report(results).splitlines()[-1].split(" | ")[3] == "not run"


def test_the_speed_report_has_the_table_and_what_it_was_made_with(tmp_path):
    with pytest.raises(ValueError, match=r"against_huggingface\.py writes it"):
        report.speed_report(tmp_path)
    record = {
        "settings": {"pairs": 2, "threads": 1, "batch": 3, "length": 4, "ours": "this", "theirs": "that 1.0"},
        "seconds": {"forward": {"ours": [0.1, 0.1], "theirs": [0.2, 0.2]}},
        "memory": {},
    }
    (tmp_path / "benchmark.json").write_text(json.dumps(record))
    lines = report.speed_report(tmp_path).splitlines()
    assert lines[2].startswith("| forward | 100.0 | 200.0 | 0.50 (")
    assert lines[-1] == "2 pairs, 1 threads, 3 rows of 4 tokens; ours: this; theirs: that 1.0."


def test_the_tables_in_the_readme_are_those_of_the_result_files():
    text = (report.ROOT / "README.md").read_text()
    assert report.written_into(text, report.report()) == text
    assert report.written_into(text, report.speed_report(), report.SPEED_START, report.SPEED_END) == text

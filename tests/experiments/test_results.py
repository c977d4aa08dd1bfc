"""Result files, and the tables and lists that are made from them."""

import dataclasses
import json
import os
import shutil
from hashlib import sha256

import pytest
from PIL import Image

from peft.experiments import compare, report
from peft.experiments.results import COSTS, SCORES, read_rows, write_rows
from peft.experiments.tasks import LORA, TASKS


def row(task, method="LoRA q,v r=4", seed=1, accuracy="0.9000", backbone="pretrained", stage="final", rate=None):
    """As the comparison plans it."""
    rate = TASKS[task].entries[method].learning_rates[0] if rate is None else rate
    scores = dict.fromkeys((*SCORES, *COSTS), "1") | {"trained_parameters": "8192", "share": "0.009896"}
    scores |= {"test_accuracy": accuracy, "seconds_per_step": "0.1", "file_bytes": "34000"}
    return compare.planned(task, method, stage, rate, seed, backbone) | scores


def rows_of(task, method="LoRA q,v r=4", accuracies=("0.9000",), backbone="pretrained", **other):
    """A choice run for each rate, of which the first is the best, and a final run for each accuracy."""
    rates = TASKS[task].entries[method].learning_rates
    rows = [row(task, method, 0, "", backbone, "choice", rate) for rate in rates]
    rows += [row(task, method, seed, accuracy, backbone) for seed, accuracy in enumerate(accuracies, 1)]
    return [own | {"validation_loss": str(1 + i)} | other for i, own in enumerate(rows)]


def test_what_is_written_is_read_back(tmp_path):
    rows = [row("qa") | {"method": 'a "quoted", name'}, row("qa", seed=2)]
    path = tmp_path / "new" / "folder" / "rows.csv"
    write_rows(path, rows[:1])
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert os.listdir(path.parent) == ["rows.csv"]
    assert read_rows(tmp_path / "none.csv") == []


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a results file of this command"):
        read_rows(tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def without_the_end(text):
    return text[:-5]


def without_the_last_letter(text):
    return text[:-1]


def without_two_fields(text):
    return text.replace(",1,1,1\n", ",1\n", 1)


def with_one_field_more(text):
    return text.replace(",1,1,1\n", ",1,1,1,1\n", 1)


def without_its_score(text):
    return text.replace("0.9000", "", 1)


def with_nan_for_a_score(text):
    return text.replace("0.9000", "nan", 1)


def with_another_stage(text):
    return text.replace("final", "finale", 1)


def with_a_run_twice(text):
    return text + text.splitlines()[-1] + "\n"


def with_a_run_twice_and_another_score(text):
    return text + text.splitlines()[-1].replace("0.9000", "0.1000") + "\n"


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (without_the_end, "line 3: the row is cut off or damaged"),
        (without_the_last_letter, "its last line is cut off; delete the line"),
        (without_two_fields, "line 2: the row is cut off or damaged; delete the line, and its run is done again"),
        (with_one_field_more, "line 2: the row is cut off or damaged"),
        (without_its_score, "line 2: the row is cut off or damaged"),
        (with_nan_for_a_score, "line 2: the row is cut off or damaged"),
        (with_another_stage, "line 2: the row is cut off or damaged"),
        (with_a_run_twice, "line 4: the same run is there twice; delete one of the two lines"),
        (with_a_run_twice_and_another_score, "line 4: the same run is there twice"),
    ],
)
def test_a_row_that_is_not_whole_or_there_twice_is_refused(damaged, said, tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [row("qa"), row("qa", seed=2)])
    path.write_text(damaged(path.read_text()))
    with pytest.raises(ValueError, match=rf"rows\.csv.*{said}"):
        read_rows(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    write_rows(path, [row("qa")])
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_rows(path, [row("qa"), row("qa", seed=2)])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.csv"]


@pytest.fixture
def results(tmp_path):
    """Two seeds on each task, and one run on a random backbone."""
    for task, accuracies in (("sentiment", ("1.0000", "0.9800")), ("qa", ("0.9000", "0.9200"))):
        rows = rows_of(task, accuracies=accuracies) + rows_of(task, accuracies=("0.5000",), backbone="random")
        write_rows(tmp_path / f"{task}.csv", rows)
    return tmp_path


def test_the_table_has_a_line_for_each_method(results):
    assert report.table(report.records_in(results), report.TOY_TASKS).splitlines() == [
        "| method | trained parameters | share | Sentiment | Question answering |",
        "|---|---:|---:|---:|---:|",
        "| LoRA q,v r=4 | 8,192 | 0.99% | 99.0% ± 1.4% (2 seeds) | 91.0% ± 1.4% (2 seeds) |",
        "| LoRA q,v r=4, random backbone | 8,192 | 0.99% | 50.0% (1 seed) | 50.0% (1 seed) |",
    ]


def test_a_method_that_was_not_run_is_not_hidden_and_one_that_is_no_part_of_the_comparison_is_marked(
    results, monkeypatch
):
    entries = TASKS["sentiment"].entries
    fewer = {name: entry for name, entry in entries.items() if name != "BitFit"}
    monkeypatch.setitem(TASKS, "sentiment", dataclasses.replace(TASKS["sentiment"], entries=fewer))
    write_rows(results / "qa.csv", rows_of("qa", "BitFit"))
    lines = report.table(report.records_in(results), report.TOY_TASKS).splitlines()
    assert lines[2] == "| LoRA q,v r=4 | 8,192 | 0.99% | 99.0% ± 1.4% (2 seeds) | not run |"
    assert lines[3] == "| LoRA q,v r=4, random backbone | 8,192 | 0.99% | 50.0% (1 seed) | not run |"
    assert lines[4] == "| BitFit | 8,192 | 0.99% | – | 90.0% (1 seed) |"


def test_without_result_files_the_cure_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no results in .*; run: python -m peft compare --task qa"):
        report.records_in(tmp_path)


def test_the_lists_of_the_readme_name_the_best_methods_and_what_they_compare_with(results):
    def of(method, *accuracies, share):
        return rows_of("qa", method, accuracies, share=share)

    rows = (
        of("IA3", "0.9501", share="0.03")
        + of("BitFit", "0.9500", share="0.01")
        + of("VeRA q,v r=128", "0.5", share="0.02")
    )
    rows += of("DoRA q,v r=4", "0.98", "1", share="0.5") + of("full fine-tuning", "0.97", share="1")
    rows += rows_of("qa", accuracies=("1",), backbone="random")
    write_rows(results / "qa.csv", rows)
    sentiment, qa = report.result_lines(report.records_in(results))
    assert sentiment == "* Sentiment, 2 seeds: LoRA q,v r=4 (trains 0.99%) 99.0%"
    text, link = qa.split(" ([")
    best = "DoRA q,v r=4 (trains 50.00%) 99.0%; BitFit (trains 1.00%) 95.0%; IA3 (trains 3.00%) 95.0%"
    assert text == f"* Question answering, 1 to 2 seeds: {best}; full fine-tuning 97.0%"
    assert link.endswith("](notebooks/results/README.md))")


RECORD = {
    "settings": {"pairs": 2, "threads": 1, "batch": 3, "length": 4, "ours": "this", "theirs": "that 1.0"},
    "seconds": {
        "forward": {"ours": [0.1, 0.1, 0.4], "theirs": [0.2, 0.2, 0.2]},
        "forward: LoRA q,v": {"ours": [0.1, 0.1, 0.1]},
        "generate: 1 row": {"ours": [0.3, 0.3, 0.3], "theirs": [0.2, 0.2, 0.2]},
        "something else": {"ours": [0.3, 0.3, 0.3], "theirs": [0.2, 0.2, 0.2]},
    },
    "memory": {
        "fit: LoRA q,v": {"ours": {"peak": 30}, "theirs": {"peak": 40}},
        "fit: LoRA all": {"ours": {"peak": 3}},
    },
}


def test_what_was_not_measured_on_both_sides_is_left_out_of_the_lists():
    assert report.speed_lines(RECORD) == [
        "* Forward pass, ours / theirs: no method 0.50",
        "* Generation, ours / theirs: 1 row 1.50",
        "* Memory of the same steps of `fit`, ours / theirs: LoRA on q and v 0.75 "
        "([every job, with its quartiles](notebooks/results/README.md))",
    ]
    assert report.speed_lines({"seconds": {}, "memory": {}}) == []


def test_the_list_goes_between_its_markers_and_nothing_else_changes():
    text = f"head\n{report.START}\nold\n{report.END}\ntail\n"
    once = report.written_into(text, ["new", "lines"], report.START, report.END)
    assert once == f"head\n{report.START}\nnew\nlines\n{report.END}\ntail\n"
    assert report.written_into(once, ["new", "lines"], report.START, report.END) == once
    with pytest.raises(ValueError, match="has lost its markers"):
        report.written_into("no markers here", ["new"], report.START, report.END)


def test_real_text_has_a_table_of_its_own_with_a_column_for_each_task(results):
    def written(task, *methods):
        write_rows(results / f"{task}.csv", [own for name in methods for own in rows_of(task, name, ("0.8",))])

    written("rotten_tomatoes", "head only", "LoRA q,v r=8")
    written("quiz", "LoRA q,v r=8")
    assert report.table(report.records_in(results), report.REAL_TASKS).splitlines()[2:] == [
        "| head only | 8,192 | 0.99% | 80.0% (1 seed) | not run | – |",
        "| LoRA q,v r=8 | 8,192 | 0.99% | 80.0% (1 seed) | not run | 80.0% (1 seed) |",
    ]


def test_the_command_writes_every_file_and_says_when_one_is_not_current(results, tmp_path, monkeypatch, capsys):
    root = tmp_path / "repository"
    shutil.copytree(results, root / "notebooks" / "results", ignore=shutil.ignore_patterns("repository"))
    places = (report.START, report.END, report.SPEED_START, report.SPEED_END)
    (root / "README.md").write_text("\n".join(["# Title", *places, "the end"]))
    monkeypatch.setattr(report, "ROOT", root)
    with pytest.raises(ValueError, match=r"against_huggingface\.py writes it"):
        report.main([])
    (root / "notebooks" / "results" / "benchmark.json").write_text(json.dumps(RECORD))
    with pytest.raises(SystemExit, match=r"README\.md does not say what the result files say: python -m peft report"):
        report.main(["--check"])
    report.main([])
    report.main(["--check"])
    readme, page = ((root / folder / "README.md").read_text() for folder in (".", "notebooks/results"))
    assert "* Sentiment, 2 seeds" in readme and "* Forward pass" in readme and readme.startswith("# Title")
    assert "| LoRA q,v r=4 | 8,192 |" in page and "| forward | 100.0 | 200.0 | 0.50 (" in page
    assert "2 pairs, 1 threads, 3 rows of 4 tokens; ours: this; theirs: that 1.0." in page
    (root / "notebooks" / "results" / "README.md").write_text(page + "by hand")
    with pytest.raises(SystemExit, match=r"results.README\.md does not say"):
        report.main(["--check"])
    report.main([])
    drawn = root / report.PICTURE
    digests = [sha256((results / f"{task}.csv").read_bytes()).hexdigest() for task in report.TOY_TASKS]
    assert Image.open(drawn).text["Source"] == f"sentiment.csv {digests[0]}; qa.csv {digests[1]}"
    for changed in (lambda: Image.new("RGB", (2, 2)).save(drawn), drawn.unlink):
        changed()
        with pytest.raises(SystemExit, match=r"results\.png does not show what the result files say"):
            report.main(["--check"])


SAID = {
    "steps": 60,
    "asked": [["A long story. Where is Nora?", "Oslo"], ["Where is Ben?", "Rome"], ["Who?", "Emma"]],
    "runs": {
        "no training": {"said": ["I do not know.", "Ben is\na  person.", "Emma"]},
        "LoRA q,v r=8": {"said": ["Oslo", " Rome", "Emma."]},
    },
}


def test_the_picture_is_of_the_language_model_once_it_has_runs(results):
    (results / report.SPOKEN).write_text(json.dumps(SAID))
    found = report.records_in(results)
    assert report.pictured(found) == ["sentiment", "qa"]
    figure = report.picture(found, results)
    assert [axis.get_title() for axis in figure.axes[1:]] == ["Sentiment", "Question answering"]
    assert figure.get_suptitle() == "Every method, with a learning rate of its own"

    write_rows(results / "movers.csv", rows_of("movers", "LoRA q,v r=8", ("0.97", "0.99")))
    rows = rows_of("records", "IA3", ("0.9",)) + rows_of("records", "no training", ("0.25",), share="0")
    rows += rows_of("records", "IA3", ("0.1",), backbone="pretrained bfloat16")
    rows += rows_of("records", LORA, ("0.5",), backbone="pretrained bfloat16")
    write_rows(results / "records.csv", rows)
    found = report.records_in(results)
    assert report.pictured(found) == ["movers", "records"]
    figure = report.picture(found, results)
    shares, movers, records = figure.axes
    assert [label.get_text() for label in shares.get_yticklabels()] == ["LoRA q,v r=8", "IA3"]
    assert [text.get_text() for axis in (movers, records) for text in axis.texts] == ["98.0", "50.0", "90.0"]
    dotted = [line for axis in (movers, records) for line in axis.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [25.0]
    assert figure.get_suptitle().splitlines() == [
        "SmolLM2, asked: Where is Ben?",
        'Before: "Ben is a person."   After 60 steps of LoRA: "Rome"   (it is Rome)',
        "Every method, with a learning rate of its own; dotted: nothing trained",
    ]
    files = [results / name for name in ("movers.csv", "records.csv", report.SPOKEN)]
    assert report.sources(found, results) == "; ".join(
        f"{file.name} {sha256(file.read_bytes()).hexdigest()}" for file in files
    )
    (results / report.SPOKEN).unlink()
    assert report.caption(results) == []


def test_what_the_repository_says_and_shows_is_what_its_result_files_say():
    found = report.records_in(report.RESULTS)
    for path, text in report.documents(found).items():
        assert path.read_text() == text, f"{path}: python -m peft report"
    assert Image.open(report.ROOT / report.PICTURE).text["Source"] == report.sources(found), "python -m peft report"
    lists = (report.ROOT / "README.md").read_text()
    for start, end in ((report.START, report.END), (report.SPEED_START, report.SPEED_END)):
        lines = lists.split(start)[1].split(end)[0].strip().splitlines()
        assert 1 <= len(lines) <= len(TASKS) and "notebooks/results/README.md" in lines[-1]

"""`python -m peft compare` and its fellows, as they are typed."""

from dataclasses import replace

import pytest
import torch

from peft.experiments import compare
from peft.experiments.cli import main, selected
from peft.experiments.results import read_rows
from peft.experiments.tasks import RANDOM_BACKBONE, TASKS

NAMES = [
    "full fine-tuning", "LoRA q,v r=4", "LoRA q,v r=4, B only", "LoRA+ q,v r=4", "rsLoRA q,v r=16", "prefix k,v n=16",
    "Houlsby adapter m=8",
]  # fmt: skip
SENTIMENT = ("compare", "--task", "sentiment")


@pytest.fixture
def few_runs(short, monkeypatch):
    """Every entry has two steps and one rate, and no step is timed: that has a test of its own."""
    own = TASKS["sentiment"]
    entries = {name: replace(entry, learning_rates=entry.learning_rates[:1]) for name, entry in own.entries.items()}
    monkeypatch.setitem(TASKS, "sentiment", replace(own, entries=entries))
    monkeypatch.setattr(compare, "step_seconds", lambda models, *_, **__: dict.fromkeys(models, 0.1))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], NAMES),
        (["lora"], NAMES[1:3]),  # whole words: neither LoRA+ nor rsLoRA
        (["prefix,adapter"], NAMES[5:7]),
        (["LoRA q,v r=4"], NAMES[1:2]),  # a whole name, with a comma in it, is that method and no other
        (["lora Q,V R=4"], NAMES[1:2]),
        (["adapter", "full"], [NAMES[0], NAMES[6]]),
        (["LoRA q,v r=4, B only", "prefix"], [NAMES[2], NAMES[5]]),
        (["LoRA q,v"], NAMES[1:3]),  # and no prefix, for its "v"
        (["prefix k,v"], NAMES[5:6]),
        (["B only"], NAMES[2:3]),
        (["lora+, full"], [NAMES[0], NAMES[3]]),
    ],
)
def test_methods_are_named_in_whole_or_by_whole_words(words, expected):
    assert selected(words, NAMES) == expected


@pytest.mark.parametrize("word", ["magic", "lora,magic", "LoRA q,k", "LoRA q,v r=8", "q", "v", "ora", "pre", "", ","])
def test_an_unknown_method_is_refused_with_those_that_exist(word, capsys):
    with pytest.raises(ValueError, match=r"no method is called .* or has it among its words; there are: full"):
        selected([word], NAMES)
    with pytest.raises(SystemExit):
        main([*SENTIMENT, "--methods", word, "--out", "nowhere"])
    assert "no method is called" in capsys.readouterr().err


@pytest.mark.slow
def test_the_comparison_says_its_cost_and_leaves_a_table_a_file_and_a_figure(few_runs, tmp_path, capsys):
    command = [*SENTIMENT, "--methods", "full,adapter m=8", "--seeds", "2", "--out", str(tmp_path)]
    main(command)
    said = capsys.readouterr().out
    assert said.startswith("12 runs to do, 24 training steps: about 0 minutes")
    assert "| Houlsby adapter m=8 | 17,472 |" in said and "(2 seeds)" in said
    rows = read_rows(tmp_path / "sentiment.csv")
    assert len(rows) == 12 and {row["seed"] for row in rows if row["stage"] == "final"} == {"1", "2"}
    assert (tmp_path / "sentiment.png").read_bytes()[:4] == b"\x89PNG"
    main(command)
    assert capsys.readouterr().out.startswith("nothing to do")
    assert len(read_rows(tmp_path / "sentiment.csv")) == 12


@pytest.mark.slow
def test_the_random_backbone_has_rows_of_its_own(few_runs, tmp_path, capsys):
    main([*SENTIMENT, "--random-backbone", "--seeds", "1", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "sentiment.csv")
    assert {row["backbone"] for row in rows} == {"random"}
    assert {row["method"] for row in rows} == set(RANDOM_BACKBONE)
    assert (tmp_path / "sentiment_random.png").exists()


def test_few_examples_have_a_file_of_their_own(few_runs, task, tmp_path, capsys, monkeypatch):
    seen, train = [], compare.fit
    monkeypatch.setattr(compare, "fit", lambda model, data, **rest: seen.append(data) or train(model, data, **rest))
    main([*SENTIMENT, "--methods", "lora+,full", "--seeds", "2", "--examples", "5", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "sentiment_5.csv")
    assert {row["task"] for row in rows} == {"sentiment_5"} and (tmp_path / "sentiment_5.png").exists()
    assert not (tmp_path / "sentiment.csv").exists()
    assert [len(data) for data in seen] == [5] * 6  # two methods, each one choice and two final runs
    assert torch.equal(seen[2].tokens, seen[3].tokens)  # the same seed draws the same rows for both methods
    assert not torch.equal(seen[2].tokens, seen[4].tokens)


@pytest.mark.parametrize("examples", [0, 10**6])
def test_too_few_or_too_many_examples_are_refused(task, examples):
    with pytest.raises(ValueError, match=rf"examples={examples}: choose between 1 and the {len(task.train)}"):
        compare.fewer(task.train, examples, seed=0)


def test_what_a_task_does_not_have_is_refused_before_any_run(short, task, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--task", "quiz", "--random-backbone", "--out", str(tmp_path)])
    assert "quiz has no random backbone; it has pretrained" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*SENTIMENT, "--examples", "17", "--out", str(tmp_path)])
    assert "examples=17: choose between 1 and the 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SENTIMENT, "--seeds", "0"], "at least 1"),
        ([*SENTIMENT, "--seeds", "-2"], "at least 1"),
        ([*SENTIMENT, "--seeds", "2.5"], "invalid"),
        ([*SENTIMENT, "--seed", "3"], "unrecognized arguments: --seed 3"),  # how many or which one?
        ([*SENTIMENT, "--threads", "0"], "at least 1"),
        ([*SENTIMENT, "--examples", "0"], "at least 1"),
        ([*SENTIMENT, "--steps", "5"], "unrecognized arguments: --steps 5"),
        ([*SENTIMENT, "--rates", "0.1"], "unrecognized arguments: --rates 0.1"),
        ([*SENTIMENT, "--precision", "float16"], "invalid choice: 'float16'"),
        (["compare", "--task", "poems"], "invalid choice: 'poems'"),
        (["report", "--che"], "unrecognized arguments"),
        (["report", "--check", "qa"], "unrecognized arguments"),
        (["doctor", "--fix"], "unrecognized arguments: --fix"),
        (["doctor", "please"], "unrecognized arguments: please"),
    ],
)
def test_what_would_be_ignored_is_refused(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, *(["--out", str(tmp_path)] if words[0] == "compare" else [])])
    assert stop.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_and_a_damaged_file_are_refused_before_any_run(few_runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "sentiment.csv").write_text("a,b\n1,2\n")
    for out, said in ((tmp_path / "file", "File exists"), (tmp_path, "is not a results file of this command")):
        with pytest.raises(SystemExit):
            main([*SENTIMENT, "--methods", "BitFit", "--out", str(out)])
        assert said in capsys.readouterr().err
    assert (tmp_path / "sentiment.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.slow
def test_a_second_command_in_the_process_gives_what_the_first_one_gave(few_runs, tmp_path):
    for folder, methods in (("first", "BitFit"), ("between", "full"), ("again", "BitFit")):
        main([*SENTIMENT, "--methods", methods, "--seeds", "1", "--out", str(tmp_path / folder)])
    first, again = (read_rows(tmp_path / folder / "sentiment.csv") for folder in ("first", "again"))
    for rows in (first, again):
        for row in rows:
            del row["seconds_per_step"]
    assert first == again


def test_methods_that_are_named_twice_are_all_run(few_runs, tmp_path):
    main([*SENTIMENT, "--methods", "BitFit", "--methods", "IA3", "--seeds", "1", "--out", str(tmp_path)])
    assert {row["method"] for row in read_rows(tmp_path / "sentiment.csv")} == {"BitFit", "IA3"}


def test_a_study_of_no_method_is_refused():
    for methods in ([], ["magic"]):
        with pytest.raises(ValueError, match=r"choose some of full fine-tuning; LoRA q,v r=4;"):
            compare.study("sentiment", methods)


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0 and "python -m peft doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="'dance' is unknown"):
        main(["dance"])

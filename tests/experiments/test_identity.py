"""Which rows of a file count: those of the comparison as it is now, whatever else was run into the same file."""

import hashlib
from dataclasses import replace
from functools import partial

import matplotlib
import pytest
import torch

from minitransformer import Transformer
from minitransformer.tasks import sentiment_splits
from minitransformer.tasks.real.dual_encoder import DualEncoder
from minitransformer.training import label_loss
from peft import LoRA
from peft.experiments import compare, report, sweep
from peft.experiments.cli import main
from peft.experiments.plots import plt
from peft.experiments.results import COSTS, SCORES, identity, read_rows, write_rows
from peft.experiments.tasks import TASKS

NAME = "LoRA+ q,v r=4"
COMMAND = ("compare", "--task", "sentiment", "--methods", NAME)


def made_up(key, *_):
    """The row of a run that nobody did: its scores follow from what identifies it."""
    score = int(hashlib.sha256(repr(identity(key)).encode()).hexdigest()[:8], 16) / 2**32
    row = (
        key
        | dict.fromkeys((*SCORES, *COSTS), "1")
        | dict.fromkeys(("validation_accuracy", "test_accuracy"), f"{score:.2f}")
    )
    return row | ({"test_accuracy": ""} if key["stage"] == "choice" else {})


@pytest.fixture(autouse=True)
def quick(short, monkeypatch):
    """The comparison on sentiment, with a base and rows from which those of `INPUTS` differ in one thing."""
    same = {"splits": OWN.splits, "models": {"pretrained": OWN.models["random"]}}
    monkeypatch.setitem(TASKS, "sentiment", replace(TASKS["sentiment"], **same))
    monkeypatch.setattr(compare, "finished", made_up)
    monkeypatch.setattr(compare, "step_seconds", lambda models, *_, **__: dict.fromkeys(models, 0.1))


def edited(monkeypatch, changes, **entry):
    """The comparison on sentiment with other settings; `entry` holds those of the one method."""
    own = TASKS["sentiment"]
    entries = own.entries | {NAME: replace(own.entries[NAME], **entry)}
    monkeypatch.setitem(TASKS, "sentiment", replace(own, entries=entries, **changes))


def other_rows(field, change):
    task = OWN.splits()
    values = getattr(task.validation, field).clone()
    values[-1] = change(values[-1])
    return replace(task, validation=replace(task.validation, **{field: values}))


def other_weights(seed):
    model = OWN.models["random"](seed)
    with torch.no_grad():
        model.blocks[1].feedforward.down.bias[3] += 1e-6
    return model


def other_heads(seed):
    model = OWN.models["random"](seed)
    same = Transformer(replace(model.config, n_heads=2 * model.config.n_heads))
    same.load_state_dict(model.state_dict())
    return same


OWN = replace(TASKS["sentiment"], splits=lambda: sentiment_splits(0, (40, 40, 40)))
EDITS = {
    "recipe": {"method": LoRA(rank=4, alpha=400)},
    "an option with a default": {"method": LoRA(rank=4, alpha=8, dropout=0.1)},
    "steps": {"steps": 3},
    "steps of a choice": {"choice_steps": 1},
    "ratio": {"ratio": 8.0},
    "members": {"members": 2, "steps": 1},
    "rates": {"learning_rates": (7e-3, 9e-3)},
    "batch size": {"changes": {"batch_size": 16}},
    "batches": {"changes": {"like_length": True}},
    "objective": {"changes": {"objective": label_loss}},
    "trained beside": {"changes": {"train_also": ("norm",)}},
}
INPUTS = {
    "an answer": {"changes": {"splits": partial(other_rows, "targets", lambda row: row + 1)}},
    "a word": {"changes": {"splits": partial(other_rows, "tokens", lambda row: row.where(row != row[1], row + 1))}},
    "weights": {"changes": {"models": {"pretrained": other_weights}}},
    "heads": {"changes": {"models": {"pretrained": other_heads}}},
}


def sweep_now(out, n=2):
    return sweep.run(compare.study("sentiment", [NAME], progress=False), out, seeds=range(1, n + 1))


@pytest.mark.slow
@pytest.mark.parametrize("edit", [*EDITS, *INPUTS])
def test_after_an_edit_the_same_file_gives_what_an_empty_one_gives(edit, tmp_path, monkeypatch):
    before = sweep_now(tmp_path / "rows.csv", 3)
    unedited = TASKS["sentiment"]
    edited(monkeypatch, **{"changes": {}} | (EDITS | INPUTS)[edit])
    after, alone = sweep_now(tmp_path / "rows.csv"), sweep_now(tmp_path / "empty.csv")
    assert sorted(after, key=identity) == sorted(alone, key=identity)
    assert sweep.summaries(after) == sweep.summaries(alone)
    again = [row for row in after if row in before]
    assert not again or edit == "steps of a choice"  # which leaves a final run with the same rate what it is
    everything = read_rows(tmp_path / "rows.csv")
    assert before == everything[: len(before)]  # they are left in the file
    if edit in EDITS:
        now = compare.current(everything, "sentiment")
        assert [row for row in now if row["seed"] in "012"] == after and (now == after or again)
    else:
        with pytest.raises(ValueError, match=r"the runs of sentiment have several inputs .* 5 rows.*: delete the rows"):
            compare.current(everything, "sentiment")
    monkeypatch.setitem(TASKS, "sentiment", unedited)
    assert sweep_now(tmp_path / "rows.csv", 3) == before  # the first comparison again: nothing is run


def test_the_default_of_a_recipe_belongs_to_it(monkeypatch):
    """As written it stays `LoRA(rank=4, alpha=8)`, but it is another one."""
    before = compare.planned("sentiment", NAME, "final", 1e-3, 1, "pretrained", inputs="known")
    default, entry = LoRA.__dataclass_fields__["dropout"], TASKS["sentiment"].entries[NAME]
    monkeypatch.setattr(default, "default", 0.5)
    edited(monkeypatch, {}, method=replace(entry.method, dropout=0.5))
    after = compare.planned("sentiment", NAME, "final", 1e-3, 1, "pretrained", inputs="known")
    assert before["recipe"] == after["recipe"] and identity(before) != identity(after)


def test_what_a_model_is_besides_its_weights_belongs_to_the_base(task, decoder):
    scales = [
        replace(TASKS["quiz"], models={"pretrained": lambda seed, s=s: DualEncoder(decoder(), s)}) for s in (20.0, 5.0)
    ]
    assert len({compare.inputs_of(own, task, "pretrained") for own in scales}) == 2


def test_a_fresh_head_is_no_part_of_the_base(task):
    heads = iter((1, 2))
    model = OWN.models["random"](0)

    def with_a_head(seed):
        model.head = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.head.weight, next(heads))
        return model

    own = replace(TASKS["sentiment"], models={"pretrained": with_a_head}, train_also=("head",))
    assert compare.inputs_of(own, task, "pretrained") == compare.inputs_of(own, task, "pretrained")


def test_fewer_seeds_than_the_file_has_are_a_table_of_fewer(tmp_path, capsys):
    main([*COMMAND, "--seeds", "5", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "sentiment.csv")
    capsys.readouterr()
    main([*COMMAND, "--seeds", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    scores = torch.tensor([float(row["test_accuracy"]) for row in rows if row["stage"] == "final"][:2]).double()
    assert f"| {scores.mean():.2%} ± {scores.std():.2%} (2 seeds) |" in said
    assert "3 more rows of these methods are of other" in said


def test_rows_of_another_task_another_backbone_or_other_examples_do_not_count(tmp_path, monkeypatch):
    before = sweep_now(tmp_path / "rows.csv")
    foreign = [row | {column: f"{row[column]}_16"} for row in before for column in ("task", "backbone")]
    write_rows(tmp_path / "rows.csv", foreign + before)
    assert sweep_now(tmp_path / "rows.csv") == compare.current(foreign + before, "sentiment") == before
    assert compare.current(foreign, "sentiment") == []
    assert compare.current(foreign, "sentiment", examples=16) != []


def test_rows_that_note_no_inputs_count_until_others_do(tmp_path):
    noted = sweep_now(tmp_path / "rows.csv")
    bare = [row | {"settings": "", "inputs": ""} for row in noted]
    assert compare.current(bare, "sentiment") == bare
    assert compare.current(bare + noted, "sentiment") == noted
    write_rows(
        tmp_path / "bare.csv", [{k: v for k, v in row.items() if k not in ("settings", "inputs")} for row in bare]
    )
    assert read_rows(tmp_path / "bare.csv") == bare
    assert sweep_now(tmp_path / "bare.csv") == noted  # a sweep knows its inputs, and does these runs again
    assert read_rows(tmp_path / "bare.csv") == bare + noted


def test_the_report_counts_what_the_comparison_has_now(tmp_path, monkeypatch):
    sweep_now(tmp_path / "sentiment.csv", 2)
    edited(monkeypatch, {}, **EDITS["recipe"])
    with pytest.raises(ValueError, match="no results in"):  # none of the comparison as it is now
        report.records_in(tmp_path)
    own = sweep_now(tmp_path / "sentiment.csv", 3)
    assert report.records_in(tmp_path)["sentiment"] == {NAME: sweep.summaries(own)[0]}


def test_nothing_of_a_command_stays_behind_in_the_process(tmp_path):
    figure, threads, style = plt.figure(), torch.get_num_threads(), dict(matplotlib.rcParams)
    main([*COMMAND, "--seeds", "1", "--threads", "3", "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads and dict(matplotlib.rcParams) == style
    assert plt.get_fignums() == [figure.number]
    plt.close(figure)
    first = (tmp_path / "sentiment.png").read_bytes()
    main([*COMMAND, "--seeds", "1", "--out", str(tmp_path)])
    assert (tmp_path / "sentiment.png").read_bytes() == first

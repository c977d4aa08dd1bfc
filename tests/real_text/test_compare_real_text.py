"""The comparisons on real text: one sweep, on tiny tasks and a tiny encoder in place of the real ones."""

import dataclasses

import pytest
import torch

from minitransformer import Transformer, TransformerConfig
from minitransformer.heads import SequenceClassifier
from minitransformer.tasks.real.dual_encoder import DualEncoder
from minitransformer.tasks.real.text import TextSplit, TextTask
from minitransformer.training import History, evaluate, label_loss
from peft import expected_parameters, parameter_table, trainable_parameters
from peft.experiments import compare, sweep, tasks
from peft.experiments.results import COLUMNS, read_rows
from peft.experiments.sweep import chosen_learning_rate, summaries
from peft.experiments.tasks import FULL, HEAD, LORA_ALL, SOUP, TASKS, UNTRAINED

CLASSES = ("rotten", "fresh")
CONFIG = TransformerConfig(vocab_size=20, max_len=24, d_model=24, n_heads=2, n_layers=2, d_ff=24, causal=False)


def split(n_rows: int, seed: int) -> TextSplit:
    """Rows whose class is whether their first token is above 9."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (n_rows, 6), generator=generator)
    mask = torch.arange(6)[None] < torch.randint(1, 7, (n_rows, 1), generator=generator)
    return TextSplit(tokens * mask, mask, (tokens[:, 0] > 9).long(), ("text",) * n_rows, CLASSES)


def questions(n_rows: int, seed: int) -> TextSplit:
    """Rows of a question and three answers: the right one starts with the question's first token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (n_rows, 4, 6), generator=generator)
    mask = torch.arange(6) < torch.randint(1, 7, (n_rows, 4, 1), generator=generator)
    targets = torch.randint(3, (n_rows,), generator=generator)
    tokens[torch.arange(n_rows), 1 + targets, 0] = tokens[:, 0, 0]
    return TextSplit(tokens * mask, mask, targets, ("text",) * n_rows, ("first", "second", "third"))


LIKE = {"classes": "rotten_tomatoes", "choices": "quiz"}
SPLITS = {"classes": split, "choices": questions}


@pytest.fixture(params=SPLITS)
def task(request, monkeypatch):
    """A tiny task of each kind and a tiny encoder in place of the real ones, so the packages are not needed."""
    make = SPLITS[request.param]
    task = TextTask("tiny", make(1, 0).classes, make(70, 0), make(20, 1), make(30, 2))
    like = TASKS[LIKE[request.param]]
    monkeypatch.setattr(tasks, "minilm", lambda: Transformer(CONFIG, seed=4))
    entries = {name: short(entry) for name, entry in like.entries.items()}
    monkeypatch.setitem(TASKS, "tiny", dataclasses.replace(like, splits=lambda: task, entries=entries))
    return task


def short(entry: tasks.Entry) -> tasks.Entry:
    """Six steps for three epochs of two batches (70 rows fill two batches of 32), two for one."""
    if not entry.steps:
        return entry
    return dataclasses.replace(entry, steps=6, choice_steps=2)


only_classes = pytest.mark.parametrize("task", ["classes"], indirect=True)
only_choices = pytest.mark.parametrize("task", ["choices"], indirect=True)
TRAINED = [(kind, name) for kind, like in LIKE.items() for name in TASKS[like].entries if name != UNTRAINED]


def expected_trained(name, task):
    head = CONFIG.d_model * 2 + 2 if len(task.classes) == 2 else 0
    method = TASKS["tiny"].entries[name].method
    if name == SOUP:
        method = dataclasses.replace(method, rank=3 * method.rank)
    if name == FULL:
        return sum(p.numel() for p in Transformer(CONFIG).parameters()) + head
    return head + (0 if method is None else expected_parameters(CONFIG, method))


def test_the_whole_sweep_and_going_on_with_it(task, tmp_path, monkeypatch):
    out = tmp_path / "results" / "rows.csv"
    entries = TASKS["tiny"].entries
    rows = sweep.run(compare.study("tiny", progress=False), out, seeds=(1,))
    assert rows == read_rows(out) and tuple(rows[0]) == COLUMNS
    final = {row["method"]: row for row in rows if row["stage"] == "final"}
    assert list(final) == list(entries)
    for name, row in final.items():
        entry = entries[name]
        choice = [row for row in rows if row["method"] == name and row["stage"] == "choice"]
        assert tuple(float(row["learning_rate"]) for row in choice) == entry.learning_rates
        assert all(row["test_accuracy"] == "" and row["seed"] == "0" for row in choice)
        assert float(row["learning_rate"]) == chosen_learning_rate(rows, name)
        assert int(row["steps"]) == entry.steps * entry.members
        assert int(row["trained_parameters"]) == expected_trained(name, task)
        assert 0.0 <= float(row["test_accuracy"]) <= 1.0
        assert int(row["file_bytes"]) > 4 * expected_trained(name, task)
    assert [record["method"] for record in summaries(rows)] == list(entries)

    done = []
    finished = compare.finished
    monkeypatch.setattr(compare, "finished", lambda key, *rest: done.append(key) or finished(key, *rest))
    first = next(iter(entries))
    again = sweep.run(compare.study("tiny", (first,), progress=False), out, seeds=(1, 2))
    assert [(key["method"], key["stage"], key["seed"]) for key in done] == [(first, "final", "2")]
    assert again == [row for row in read_rows(out) if row["method"] == first] and read_rows(out)[:-1] == rows


@pytest.mark.parametrize(("task", "name"), TRAINED, indirect=["task"])
def test_the_same_seed_gives_the_same_bits(task, name):
    first, second = (compare.train(task, name, 1e-2, 2, seed=3, progress=False)[0] for _ in range(2))
    for key, tensor in trainable_parameters(first).items():
        assert torch.equal(tensor, trainable_parameters(second)[key])


@only_classes
def test_a_soup_is_the_mean_of_runs_with_seeds_of_their_own(task):
    entry = TASKS["tiny"].entries[SOUP]
    assert [entry.seeds(run) for run in (1, 2)] == [[1, 2, 3], [4, 5, 6]]
    assert tasks.Entry(None, (1e-3,), 1).seeds(5) == [5]
    runs = [compare.train(task, SOUP, 1e-2, 4, seed, progress=False) for seed in (4, 5, 6)]
    mixed, history = compare.mixed(runs, TASKS["tiny"].models["pretrained"](4))
    assert history.loss == [loss for _, own in runs for loss in own.loss] and history.seconds > 0
    mean = torch.stack([model.head.weight for model, _ in runs]).mean(dim=0)
    torch.testing.assert_close(mixed.head.weight, mean)
    site = "blocks.1.attention.value"
    updates = [model.transformer.get_submodule(site).changed_weight() for model, _ in runs]
    mean = torch.stack(updates).mean(dim=0)
    torch.testing.assert_close(mixed.transformer.get_submodule(site).changed_weight(), mean, atol=1e-6, rtol=1e-5)


@only_classes
def test_the_row_of_a_soup_is_that_of_its_mean(task):
    key = compare.planned("tiny", SOUP, "final", 1e-2, 2, "pretrained")
    assert key["steps"] == "18"
    row = compare.finished(key, task, progress=False)
    runs = [compare.train(task, SOUP, 1e-2, 6, seed, progress=False) for seed in (4, 5, 6)]
    mixed, _ = compare.mixed(runs, TASKS["tiny"].models["pretrained"](4))
    assert float(row["test_accuracy"]) == pytest.approx(evaluate(mixed, task.test, label_loss)["accuracy"], abs=1e-4)
    assert int(row["trained_parameters"]) == parameter_table(mixed).trained


@pytest.mark.parametrize("name", [HEAD, FULL, LORA_ALL])
@only_classes
def test_few_examples_of_a_text_task_are_drawn_by_the_seed_and_nothing_else_is_seen(task, name, monkeypatch):
    """Fewer than a batch: a step sees all of them, and each of them in every step."""
    seen = []
    monkeypatch.setattr(
        compare, "fit", lambda _, data, **rest: seen.append((data, rest.get("batch_size"))) or History()
    )
    compare.train(task, name, 1e-2, 3, seed=2, examples=5)
    compare.train(task, name, 1e-2, 3, seed=3, examples=5)
    drawn = compare.fewer(task.train, 5, seed=2)
    for (data, batch_size), rows in zip(seen, (drawn, compare.fewer(task.train, 5, seed=3)), strict=True):
        batch = data(0) if callable(data) else data
        assert len(batch) == 5 and batch_size == (None if callable(data) else 5)
        assert sorted(batch.targets.tolist()) == sorted(rows.targets.tolist())
        if callable(data):
            assert sorted(batch.tokens.flatten().tolist()) == sorted(rows.trimmed().tokens.flatten().tolist())


@only_classes
def test_head_only_moves_the_head_and_nothing_else(task):
    model, _ = compare.train(task, HEAD, 1e-2, 4, seed=1, progress=False)
    before = compare.model_for("tiny", HEAD, seed=1)
    assert list(trainable_parameters(model)) == ["head.weight", "head.bias"]
    assert not torch.equal(model.head.weight, before.head.weight)
    for ours, theirs in zip(model.transformer.parameters(), before.transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@only_classes
def test_stored_features_give_the_scores_and_gradients_of_the_whole_model(task):
    model = compare.model_for("tiny", HEAD, seed=1)
    stored = compare.StoredFeatures(model, task.train)
    rows = torch.tensor([5, 0, 69])
    batch, chosen = task.train.rows(rows), stored.rows.rows(rows)
    assert torch.equal(chosen.targets, batch.targets)
    ours, theirs = stored(chosen.tokens, chosen.padding_mask), model(batch.tokens, batch.padding_mask)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad((out**2).sum(), model.head.weight)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_the_score_does_not_depend_on_the_order(task):
    model = compare.model_for("tiny", FULL, seed=1)
    real, n = task.test, len(task.test)
    logits = model(real.tokens, real.padding_mask)
    right = int((logits.argmax(dim=1) == real.targets).sum())
    result = evaluate(model, real, label_loss)
    assert result["accuracy"] == pytest.approx(right / n)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, real.targets).item(), abs=1e-5)


def test_an_unknown_method_is_refused(task):
    with pytest.raises(ValueError, match=r"'magic' is unknown; choose one of .*full fine-tuning, LoRA"):
        compare.model_for("tiny", "magic", seed=0)


@only_choices
def test_no_training_leaves_every_weight_and_still_answers(task):
    model, history = compare.train(task, UNTRAINED, 0.0, 0, seed=1)
    assert not history.loss and parameter_table(model).trained == 0
    for ours, theirs in zip(model.transformer.parameters(), Transformer(CONFIG, seed=4).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert 0.0 <= evaluate(model, task.test, label_loss)["accuracy"] <= 1.0


@pytest.mark.parametrize("name", tasks.EPOCH)
def test_every_task_has_models_of_its_kind_with_matched_sizes(name, monkeypatch):
    """On MiniLM's own shape, without its weights."""
    minilm = TransformerConfig(30_522, 512, 384, 12, 6, 1536, causal=False)
    monkeypatch.setattr(tasks, "minilm", lambda: Transformer(CONFIG, seed=4))
    setting = TASKS[name]
    for entry_name, entry in setting.entries.items():
        model = compare.model_for(name, entry_name, seed=0)
        assert isinstance(model, DualEncoder if name == "quiz" else SequenceClassifier)
        if entry.method is not None and entry_name not in (LORA_ALL, SOUP):
            assert 73_000 < expected_parameters(minilm, entry.method) < 79_000

import dataclasses

import pytest
import torch

from minitransformer import Transformer, TransformerConfig
from minitransformer.dual_encoder import DualEncoder
from minitransformer.heads import SequenceClassifier
from minitransformer.tasks.real.text import TextSplit, TextTask
from peft import expected_parameters, parameter_table, trainable_parameters
from peft.experiments import compare_real_text as real_text
from peft.experiments import real_tasks, sweep
from peft.experiments.results import read_rows
from peft.experiments.sweep import chosen_learning_rate, summaries

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
    like = real_tasks.TASKS[LIKE[request.param]]
    monkeypatch.setattr(real_tasks, "minilm", lambda: Transformer(CONFIG, seed=4))
    tiny = real_tasks.RealTask("Tiny", lambda: task, like.model, like.entries, like.train_also)
    monkeypatch.setitem(real_tasks.TASKS, "tiny", tiny)
    return task


only_classes = pytest.mark.parametrize("task", ["classes"], indirect=True)
only_choices = pytest.mark.parametrize("task", ["choices"], indirect=True)
TRAINED = [
    (kind, name)
    for kind, like in LIKE.items()
    for name in real_tasks.TASKS[like].entries
    if name != real_tasks.UNTRAINED
]


def expected_trained(name, task):
    head = CONFIG.d_model * 2 + 2 if len(task.classes) == 2 else 0
    method = real_tasks.TASKS["tiny"].entries[name].method
    if name == real_tasks.SOUP:
        method = dataclasses.replace(method, rank=3 * method.rank)
    if name == real_tasks.FULL:
        return sum(p.numel() for p in Transformer(CONFIG).parameters()) + head
    return head + (0 if method is None else expected_parameters(CONFIG, method))


def test_the_whole_sweep_and_going_on_with_it(task, tmp_path, monkeypatch):
    out = tmp_path / "results" / "rows.csv"
    entries = real_tasks.TASKS["tiny"].entries
    rows = sweep.run(real_text.study("tiny", progress=False), out, seeds=(1,))
    assert rows == read_rows(out, real_text.COLUMNS)
    final = {row["method"]: row for row in rows if row["stage"] == "final"}
    assert list(final) == list(entries)
    for name, row in final.items():
        entry = entries[name]
        choice = [row for row in rows if row["method"] == name and row["stage"] == "choice"]
        assert tuple(float(row["learning_rate"]) for row in choice) == entry.learning_rates
        assert all(row["test_accuracy"] == "" and row["seed"] == "0" for row in choice)
        assert float(row["learning_rate"]) == chosen_learning_rate(rows, name, "pretrained")
        assert int(row["steps"]) == entry.epochs * entry.members * 2  # 70 rows fill two batches of 32
        assert int(row["trained_parameters"]) == expected_trained(name, task)
        assert 0.0 <= float(row["test_accuracy"]) <= 1.0
        assert int(row["file_bytes"]) > 4 * expected_trained(name, task)
    assert [record["method"] for record in summaries(rows)] == list(entries)

    done = []
    finished = real_text.finished
    monkeypatch.setattr(real_text, "finished", lambda key, *rest: done.append(key) or finished(key, *rest))
    first = next(iter(entries))
    again = sweep.run(real_text.study("tiny", (first,), progress=False), out, seeds=(1, 2))
    assert [(key["method"], key["stage"], key["seed"]) for key in done] == [(first, "final", "2")]
    assert again[:-1] == rows


@pytest.mark.parametrize(("task", "name"), TRAINED, indirect=["task"])
def test_the_same_seed_gives_the_same_bits(task, name):
    first, second = (real_text.train(name, 1e-2, task, 1, seed=3, progress=False)[0] for _ in range(2))
    for key, tensor in trainable_parameters(first).items():
        assert torch.equal(tensor, trainable_parameters(second)[key])


@only_classes
def test_a_soup_is_the_mean_of_runs_with_seeds_of_their_own(task):
    entry = real_tasks.TASKS["tiny"].entries[real_tasks.SOUP]
    assert [entry.seeds(run) for run in (1, 2)] == [[1, 2, 3], [4, 5, 6]]
    assert real_tasks.Entry(None, (1e-3,)).seeds(5) == [5]
    mixed, history = real_text.train_soup(real_tasks.SOUP, 1e-2, task, 2, entry.seeds(2), progress=False)
    runs = [real_text.train(real_tasks.SOUP, 1e-2, task, 2, seed, progress=False) for seed in (4, 5, 6)]
    assert history.loss == [loss for _, own in runs for loss in own.loss] and history.seconds > 0
    mean = torch.stack([model.head.weight for model, _ in runs]).mean(dim=0)
    torch.testing.assert_close(mixed.head.weight, mean)
    site = "blocks.1.attention.value"
    updates = [model.transformer.get_submodule(site).changed_weight() for model, _ in runs]
    mean = torch.stack(updates).mean(dim=0)
    torch.testing.assert_close(mixed.transformer.get_submodule(site).changed_weight(), mean, atol=1e-6, rtol=1e-5)


@only_classes
def test_the_row_of_a_soup_is_that_of_its_mean(task):
    key = real_text.planned(real_tasks.SOUP, "final", 1e-2, 2, task)
    row = real_text.finished(key, task, progress=False)
    entry = real_tasks.TASKS["tiny"].entries[real_tasks.SOUP]
    mixed, _ = real_text.train_soup(real_tasks.SOUP, 1e-2, task, entry.epochs, [4, 5, 6], progress=False)
    assert float(row["test_accuracy"]) == pytest.approx(real_text.score(mixed, task.test)["accuracy"], abs=1e-4)
    assert int(row["trained_parameters"]) == parameter_table(mixed).trained


@only_classes
def test_head_only_moves_the_head_and_nothing_else(task):
    model, _ = real_text.train(real_tasks.HEAD, 1e-2, task, 2, progress=False)
    before = real_tasks.model_for("tiny", real_tasks.HEAD, seed=1)
    assert list(trainable_parameters(model)) == ["head.weight", "head.bias"]
    assert not torch.equal(model.head.weight, before.head.weight)
    for ours, theirs in zip(model.transformer.parameters(), before.transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@only_classes
def test_stored_features_give_the_scores_and_gradients_of_the_whole_model(task):
    model = real_tasks.model_for("tiny", real_tasks.HEAD, seed=1)
    stored = real_text.StoredFeatures(model, task.train)
    rows = torch.tensor([5, 0, 69])
    batch, chosen = task.train.rows(rows), stored.rows.rows(rows)
    assert torch.equal(chosen.targets, batch.targets)
    ours, theirs = stored(chosen.tokens, chosen.padding_mask), model(batch.tokens, batch.padding_mask)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad((out**2).sum(), model.head.weight)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_the_score_does_not_depend_on_the_order(task):
    model = real_tasks.model_for("tiny", real_tasks.FULL, seed=1)
    real, n = task.test, len(task.test)
    logits = model(real.tokens, real.padding_mask)
    right = int((logits.argmax(dim=1) == real.targets).sum())
    result = real_text.score(model, real)
    assert result["accuracy"] == pytest.approx(right / n)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, real.targets).item(), abs=1e-5)


def test_an_unknown_method_is_refused(task):
    with pytest.raises(ValueError, match=r"'magic' is unknown; choose one of .*full fine-tuning, LoRA"):
        real_tasks.model_for("tiny", "magic", seed=0)


@only_choices
def test_no_training_leaves_every_weight_and_still_answers(task):
    model, history = real_text.train(real_tasks.UNTRAINED, 0.0, task, 0)
    assert not history.loss and parameter_table(model).trained == 0
    for ours, theirs in zip(model.transformer.parameters(), Transformer(CONFIG, seed=4).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert 0.0 <= real_text.score(model, task.test)["accuracy"] <= 1.0


@pytest.mark.parametrize("name", list(real_tasks.TASKS))
def test_every_task_has_models_of_its_kind_with_matched_sizes(name, monkeypatch):
    """On MiniLM's own shape, without its weights."""
    minilm = TransformerConfig(30_522, 512, 384, 12, 6, 1536, causal=False)
    monkeypatch.setattr(real_tasks, "minilm", lambda: Transformer(CONFIG, seed=4))
    setting = real_tasks.TASKS[name]
    for entry_name, entry in setting.entries.items():
        model = real_tasks.model_for(name, entry_name, seed=0)
        assert isinstance(model, DualEncoder if name == "quiz" else SequenceClassifier)
        if entry.method is not None and entry_name not in (real_tasks.LORA_ALL, real_tasks.SOUP):
            assert 73_000 < expected_parameters(minilm, entry.method) < 79_000

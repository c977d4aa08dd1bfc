import pytest
import torch

from minitransformer import Transformer, TransformerConfig
from minitransformer.tasks.rotten_tomatoes import TextSplit, TextTask
from peft import compare_real_text as real_text
from peft import expected_parameters, sweep, trainable_parameters
from peft.results import read_rows
from peft.sweep import chosen_learning_rate, summaries

CONFIG = TransformerConfig(vocab_size=20, max_len=24, d_model=16, n_heads=2, n_layers=2, d_ff=24, causal=False)


def split(n_rows: int, seed: int) -> TextSplit:
    """Rows whose class is whether their first token is above 9."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (n_rows, 6), generator=generator)
    mask = torch.arange(6)[None] < torch.randint(1, 7, (n_rows, 1), generator=generator)
    return TextSplit(tokens * mask, mask, (tokens[:, 0] > 9).long(), ("text",) * n_rows, ("film",) * n_rows)


@pytest.fixture
def task(monkeypatch):
    """A tiny task and a tiny encoder in place of the real ones, so the packages are not needed."""
    task = TextTask("tiny", ("rotten", "fresh"), split(70, 0), split(20, 1), split(30, 2))
    monkeypatch.setattr(real_text, "minilm", lambda: Transformer(CONFIG, seed=4))
    monkeypatch.setattr(real_text, "rotten_tomatoes_splits", lambda: task)
    return task


def expected_trained(name):
    head = CONFIG.d_model * 2 + 2
    method = real_text.ENTRIES[name].method
    if name == real_text.FULL:
        return sum(p.numel() for p in Transformer(CONFIG).parameters()) + head
    return head + (0 if method is None else expected_parameters(CONFIG, method))


def test_the_whole_sweep_and_going_on_with_it(task, tmp_path, monkeypatch):
    out = tmp_path / "results" / "rows.csv"
    rows = sweep.run(real_text.study(progress=False), out, seeds=(1,))
    assert rows == read_rows(out, real_text.COLUMNS)
    final = {row["method"]: row for row in rows if row["stage"] == "final"}
    assert list(final) == list(real_text.ENTRIES)
    for name, row in final.items():
        entry = real_text.ENTRIES[name]
        choice = [row for row in rows if row["method"] == name and row["stage"] == "choice"]
        assert tuple(float(row["learning_rate"]) for row in choice) == entry.learning_rates
        assert all(row["test_accuracy"] == "" and row["seed"] == "0" for row in choice)
        assert float(row["learning_rate"]) == chosen_learning_rate(rows, name, "pretrained")
        assert int(row["steps"]) == entry.epochs * 2  # 70 rows fill two batches of 32
        assert int(row["trained_parameters"]) == expected_trained(name)
        assert 0.0 <= float(row["test_accuracy"]) <= 1.0
        assert int(row["file_bytes"]) > 4 * expected_trained(name)
    assert [record["method"] for record in summaries(rows)] == list(real_text.ENTRIES)

    done = []
    finished = real_text.finished
    monkeypatch.setattr(real_text, "finished", lambda key, *rest: done.append(key) or finished(key, *rest))
    again = sweep.run(real_text.study((real_text.HEAD,), progress=False), out, seeds=(1, 2))
    assert [(key["method"], key["stage"], key["seed"]) for key in done] == [(real_text.HEAD, "final", "2")]
    assert again[:-1] == rows


@pytest.mark.parametrize("name", list(real_text.ENTRIES))
def test_the_same_seed_gives_the_same_bits(task, name):
    first, second = (real_text.train(name, 1e-2, task, 1, seed=3, progress=False)[0] for _ in range(2))
    for key, tensor in trainable_parameters(first).items():
        assert torch.equal(tensor, trainable_parameters(second)[key])


def test_head_only_moves_the_head_and_nothing_else(task):
    model, _ = real_text.train(real_text.HEAD, 1e-2, task, 2, progress=False)
    before = real_text.classifier(real_text.HEAD, seed=1)
    assert list(trainable_parameters(model)) == ["head.weight", "head.bias"]
    assert not torch.equal(model.head.weight, before.head.weight)
    for ours, theirs in zip(model.transformer.parameters(), before.transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_stored_features_give_the_scores_and_gradients_of_the_whole_model(task):
    model = real_text.classifier(real_text.HEAD, seed=1)
    stored = real_text.StoredFeatures(model, task.train)
    rows = torch.tensor([5, 0, 69])
    batch, chosen = task.train.rows(rows), stored.rows.rows(rows)
    assert torch.equal(chosen.targets, batch.targets)
    ours, theirs = stored(chosen.tokens, chosen.padding_mask), model(batch.tokens, batch.padding_mask)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad((out**2).sum(), model.head.weight)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_the_score_does_not_depend_on_the_order(task):
    model = real_text.classifier(real_text.FULL, seed=1)
    real, n = task.test, len(task.test)
    logits = model(real.tokens, real.padding_mask)
    right = int((logits.argmax(dim=1) == real.targets).sum())
    result = real_text.score(model, real)
    assert result["accuracy"] == pytest.approx(right / n)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, real.targets).item(), abs=1e-5)


def test_an_unknown_method_is_refused(task):
    with pytest.raises(ValueError, match=r"'magic' is unknown; choose one of head only, full fine-tuning"):
        real_text.classifier("magic", seed=0)

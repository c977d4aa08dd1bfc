import dataclasses
import math

import numpy as np
import pytest
import torch
from reference.numpy_transformer import NumpyAdamW, clip_by_global_norm
from reference.random_weights import randomize
from torch import nn

import peft
from minitransformer import SequenceClassifier, Transformer, TransformerConfig
from minitransformer.tasks import Dataset
from minitransformer.training import (
    History,
    Score,
    answer_loss,
    answer_only,
    check_optimizer,
    evaluate,
    fit,
    label_loss,
    learning_rate_factor,
    next_token_loss,
    predict,
)

CONFIG = {"vocab_size": 11, "max_len": 8, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32}


def transformer(**changes):
    return Transformer(TransformerConfig(**(CONFIG | changes)))


def first_word_task(n=64, seed=0):
    """The answer is the first word of a row of 2 to 6 words: learnable by attention in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 11, (n, 6), generator=generator)
    real = torch.arange(6) < torch.randint(2, 7, (n, 1), generator=generator)
    return Dataset(tokens.masked_fill(~real, 0), real, tokens[:, 0])


DATA, HELD_OUT = first_word_task(), first_word_task(32, seed=1)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# --- objectives and evaluation ---


def test_answer_loss_is_the_cross_entropy_at_the_last_real_token():
    model = randomize(transformer())
    expected, correct = 0.0, 0
    for row, real, target in zip(DATA.tokens, DATA.padding_mask, DATA.targets, strict=True):
        logits = model(row[real][None])[0, -1]
        expected -= logits.log_softmax(dim=0)[target].item() / len(DATA)
        correct += int(logits.argmax() == target)
    score = answer_loss(model, DATA)
    assert score.loss.item() == pytest.approx(expected, abs=1e-5)
    assert (score.correct, score.count) == (correct, 64)


def test_next_token_loss_asks_for_every_word_that_follows_a_real_one():
    model = randomize(transformer())
    terms = []
    for row, real in zip(DATA.tokens, DATA.padding_mask, strict=True):
        log_p = model(row[real][None])[0].log_softmax(dim=-1)
        terms += [-log_p[t, word].item() for t, word in enumerate(row[real][1:])]
    score = next_token_loss(model, DATA)
    assert score.loss.item() == pytest.approx(np.mean(terms), abs=1e-5) and score.count == len(terms)


def test_label_loss_is_the_cross_entropy_of_the_class():
    model = SequenceClassifier(randomize(transformer()), n_classes=11)
    log_p = model(DATA.tokens, DATA.padding_mask).log_softmax(dim=-1)
    expected = -log_p[torch.arange(64), DATA.targets].mean().item()
    assert label_loss(model, DATA).loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", [answer_loss, next_token_loss])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_does_not_depend_on_the_batch_size(objective, batch_size):
    rows = first_word_task(20)
    one_word = rows.padding_mask & (torch.arange(6) == 0)
    real = torch.where(torch.arange(20)[:, None] == 0, one_word, rows.padding_mask)  # row 0 asks for no next word
    short = Dataset(rows.tokens, real, rows.targets)
    model = randomize(transformer())
    expected = objective(model, short)
    result = evaluate(model, short, objective, batch_size)
    assert result["loss"] == pytest.approx(expected.loss.item(), abs=1e-5)
    assert result["accuracy"] == expected.correct / expected.count


def test_evaluation_is_without_dropout_and_restores_every_mode():
    model = randomize(transformer(dropout=0.5)).train()
    model.blocks[0].eval()
    assert evaluate(model, DATA) == evaluate(model, DATA)
    assert model.training and model.embedding.training and not model.blocks[0].attention.training


def silent_at(rows, *numbers):
    """The same rows, of which some ask nothing."""
    targets = rows.targets.clone()
    targets[list(numbers)] = -100
    return Dataset(rows.tokens, rows.padding_mask, targets)


@pytest.mark.parametrize("objective", [answer_loss, label_loss])
def test_a_label_of_minus_100_counts_nowhere(objective):
    model = randomize(transformer())
    model = SequenceClassifier(model, n_classes=11) if objective is label_loss else model
    rows = first_word_task(20)
    asked = [number for number in range(20) if number not in (0, 7, 8, 19)]
    expected = objective(model, rows.rows(torch.tensor(asked)))
    partly = silent_at(rows, 0, 7, 8, 19)
    score = objective(model, partly)
    assert score.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert (score.correct, score.count) == (expected.correct, 16)
    for batch_size in (1, 3, 20):
        result = evaluate(model, partly, objective, batch_size)
        assert result["loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
        assert result["accuracy"] == expected.correct / 16
    nothing = objective(model, silent_at(rows, *range(20)))
    assert (nothing.loss.item(), nothing.correct, nothing.count) == (0.0, 0, 0)
    nothing.loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("vocab_size", [11, 3000])
def test_a_word_of_minus_100_counts_nowhere(vocab_size):
    """Also where the loss has a fast form."""
    model = randomize(transformer(vocab_size=vocab_size))
    tokens = torch.randint(11, (50, 8), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(1, dims=1)
    targets[:, ::3] = -100
    logits = model(tokens)
    score = answer_only(model, Dataset(tokens, torch.ones_like(tokens, dtype=torch.bool), targets))
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert score.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (score.count, score.correct) == (250, int((logits.argmax(dim=-1) == targets).sum()))


def test_an_encoder_does_not_learn_to_copy():
    class Inside(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.hidden = model, model.hidden

    for model in (transformer(causal=False), Inside(transformer(causal=False))):
        with pytest.raises(ValueError, match=r"an encoder sees the next word .* take a model with causal=True"):
            next_token_loss(model, DATA)


@pytest.mark.parametrize(
    "objective, rows, message",
    [
        (answer_loss, Dataset(DATA.tokens, DATA.padding_mask, DATA.targets + 5), "is none of the 11 classes or words"),
        (answer_loss, Dataset(DATA.tokens, DATA.padding_mask, DATA.targets - 20), "is none of the 11"),
        (label_loss, DATA, "is none of the 4 classes"),
        (label_loss, lambda step: Dataset(DATA.tokens, DATA.padding_mask, DATA.targets.float()), "be whole numbers"),
        (next_token_loss, Dataset(DATA.tokens[:, :1], DATA.padding_mask[:, :1], DATA.targets), "asks nothing: "),
        (answer_loss, silent_at(DATA, *range(64)), "every label is -100"),
        (answer_loss, Dataset(DATA.tokens[:, None], DATA.padding_mask[:, None], DATA.targets), r"tokens \[N, T\]"),
        ("label_loss of a language model", DATA, "label_loss is for a SequenceClassifier"),
        ("answer_loss of a classifier", DATA, "a language model .* not a SequenceClassifier"),
        (lambda model, batch: answer_loss(model, batch).loss, DATA, r"give a Score\(loss, correct, count\)"),
        (answer_loss, [DATA], "train is empty, or a list; give a Dataset with rows"),
        (answer_loss, lambda step: DATA.tokens, "the batch of step 0 is empty, or a Tensor"),
        (answer_loss, lambda step: DATA.rows(slice(0, 0)), "the batch of step 0 is empty, or a Dataset"),
    ],
)
def test_data_of_another_form_are_refused_with_what_is_wanted(objective, rows, message, unchecked):
    headed = objective in (label_loss, "answer_loss of a classifier")
    model = SequenceClassifier(transformer(), n_classes=4) if headed else transformer()
    if isinstance(objective, str):
        objective = answer_loss if headed else label_loss
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        fit(model, rows, steps=1, objective=objective, progress=False)
    assert same_bits(before, weights_of(model))


def test_an_empty_set_has_no_score():
    with pytest.raises(ValueError, match="the data set asks nothing: it is empty"):
        evaluate(transformer(), DATA.rows(slice(0, 0)))
    with pytest.raises(ValueError, match="every label is -100"):
        evaluate(transformer(), silent_at(DATA, *range(64)))
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number, at least 1"):
        evaluate(transformer(), DATA, batch_size=0)
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number, at least 1"):
        predict(transformer(), DATA, batch_size=0)


def test_prediction_is_the_best_word_or_the_best_of_the_choices():
    model = randomize(transformer())
    rows = zip(DATA.tokens, DATA.padding_mask, strict=True)
    logits = torch.stack([model(row[real][None])[0, -1] for row, real in rows])
    assert torch.equal(predict(model, DATA, batch_size=10), logits.argmax(dim=-1))
    among = predict(model, DATA, choices=[7, 2, 5], batch_size=10)
    assert set(among.tolist()) <= {2, 5, 7}
    assert torch.equal(among, torch.tensor([7, 2, 5])[logits[:, [7, 2, 5]].argmax(dim=-1)])
    answers = dataclasses.replace(DATA, targets=DATA.tokens)  # [N, T], as `answer_only` takes them
    assert torch.equal(predict(model, answers, batch_size=10), logits.argmax(dim=-1))
    with pytest.raises(
        ValueError, match=f"choice=99 must be a whole number, at least 0 and at most {logits.shape[1] - 1}"
    ):
        predict(model, DATA, choices=[1, 99])


# --- the loop ---


def test_fit_learns_a_small_task():
    model = transformer(init="unit_embedding", logit_scale=0.25)
    before = evaluate(model, HELD_OUT)
    history = fit(model, first_word_task(512), HELD_OUT, steps=120, learning_rate=1e-2, progress=False)
    after = evaluate(model, HELD_OUT)
    assert after["loss"] < before["loss"] / 4 and after["accuracy"] > 0.9
    assert history.validation_accuracy == [after["accuracy"]] and history.validation_loss == [after["loss"]]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    def run(seed, state):
        torch.manual_seed(state)
        model = transformer(dropout=0.2)
        history = fit(model, DATA, steps=6, seed=seed, progress=False)
        return history.loss, weights_of(model)

    with torch.random.fork_rng():
        (loss, weights), (loss_again, weights_again), (loss_other, _) = run(1, 5), run(1, 6), run(2, 5)
    assert loss == loss_again and same_bits(weights, weights_again)
    assert loss != loss_other


def test_the_callers_random_state_is_left_alone():
    before = torch.get_rng_state()
    fit(transformer(dropout=0.2), DATA, steps=2, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_history_records_every_step_and_every_validation():
    history = fit(transformer(), DATA, HELD_OUT, steps=7, validate_every=3, progress=False)
    assert [len(x) for x in (history.loss, history.accuracy, history.learning_rate, history.gradient_norm)] == [7] * 4
    assert history.validation_step == [3, 6, 7]
    assert len(history.validation_loss) == len(history.validation_accuracy) == 3
    assert history.seconds > 0
    assert history.seconds_per_step == history.seconds / 7
    assert all(0 <= share <= 1 for share in history.accuracy)
    assert History().seconds_per_step == 0


def test_without_validation_nothing_is_validated():
    assert fit(transformer(), DATA, steps=2, progress=False).validation_step == []


def test_each_epoch_walks_all_rows_in_a_new_order():
    seen = []

    def watch(model, batch):
        seen.append(batch.targets.tolist())
        return answer_loss(model, batch)

    rows = Dataset(torch.ones(8, 2, dtype=torch.long), torch.ones(8, 2).bool(), torch.arange(8))
    fit(transformer(), rows, steps=4, batch_size=4, objective=watch, progress=False)
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_batches_may_come_from_a_function_of_the_step():
    asked = []

    def batch_at(step):
        asked.append(step)
        return DATA.rows(slice(step, step + 5))

    fit(transformer(), batch_at, steps=3, progress=False)
    assert asked == [0, 1, 2]


def test_frozen_tensors_do_not_move_and_get_no_gradient():
    model = transformer().requires_grad_(False)
    model.blocks[0].attention.query.weight.requires_grad_(True)
    before = weights_of(model)
    fit(model, DATA, steps=3, progress=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"blocks.0.attention.query.weight"}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in moved)


def test_dropout_is_active_in_fit_and_off_in_validation():
    modes = []

    def watch(model, batch):
        modes.append({module.training for module in model.modules()})
        return answer_loss(model, batch)

    model = transformer(dropout=0.5).eval()
    fit(model, DATA, HELD_OUT, steps=2, validate_every=1, objective=watch, progress=False)
    assert modes == [{True}, {False}, {True}, {False}]
    assert not model.training


def test_gradient_checkpointing_trains_to_the_same_bits():
    results = []
    for checkpointing in (False, True):
        model = transformer(gradient_checkpointing=checkpointing, dropout=0.1)
        fit(model, DATA, steps=4, progress=False)
        results.append(weights_of(model))
    assert same_bits(*results)


def test_the_bar_shows_loss_and_accuracy(capsys):
    fit(transformer(), DATA, steps=3, description="first words")
    shown = capsys.readouterr().out
    assert "first words" in shown and "3/3" in shown and "loss 2." in shown and "accuracy " in shown and "%" in shown


def test_the_bar_can_be_switched_off(capsys):
    fit(transformer(), DATA, steps=2, progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# --- learning rate, optimizer ---


@pytest.mark.parametrize("step", [0, 3, 4, 10, 29])
@pytest.mark.parametrize(
    "schedule, decay",
    [
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("linear", lambda done: 1 - done),
        ("constant", lambda done: 1.0),
    ],
)
def test_the_schedule_is_a_warm_up_and_a_decay(schedule, decay, step):
    expected = (step + 1) / 5 if step < 4 else decay((step - 4) / 26)
    assert learning_rate_factor(step, steps=30, warmup=4, schedule=schedule) == pytest.approx(expected)


def test_a_schedule_may_be_a_function_of_the_step():
    options = {"steps": 4, "learning_rate": 0.5, "schedule": lambda step: 2.0**-step, "progress": False}
    assert fit(transformer(), DATA, **options).learning_rate == [0.5, 0.25, 0.125, 0.0625]


def test_fit_follows_the_schedule_from_the_optimizers_rates_and_restores_them():
    model = transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    history = fit(model, DATA, steps=5, warmup=1, schedule="linear", optimizer=optimizer, progress=False)
    assert history.learning_rate == pytest.approx([0.25, 0.5, 0.375, 0.25, 0.125])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_twentieth_of_the_steps_is_warm_up_by_default():
    rates = fit(transformer(), DATA, steps=40, learning_rate=1.0, schedule="constant", progress=False).learning_rate
    assert rates == pytest.approx([1 / 3, 2 / 3] + [1.0] * 38)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_five_steps_equal_adamw_by_hand(clip):
    settings = {"learning_rate": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.3}
    model, twin = transformer().double(), transformer().double()
    by_hand = NumpyAdamW({name: p.numpy() for name, p in weights_of(twin).items()}, **settings)
    norms = []
    for step in range(5):
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(torch.from_numpy(by_hand.weights[name]))
        twin.zero_grad()
        answer_loss(twin, DATA.rows(slice(step, step + 8))).loss.backward()
        gradients = {name: p.grad.numpy() for name, p in twin.named_parameters()}
        gradients, norm = clip_by_global_norm(gradients, clip or math.inf)
        norms.append(norm)
        by_hand.step(gradients, factor=1 - step / 5)
    history = fit(
        model,
        lambda step: DATA.rows(slice(step, step + 8)),
        steps=5,
        warmup=0,
        schedule="linear",
        clip=clip,
        progress=False,
        **settings,
    )
    assert history.gradient_norm == pytest.approx(norms, rel=1e-4) and max(norms) > 0.5
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach(), by_hand.weights[name], atol=1e-5, err_msg=name)


# --- refusals ---


class NaNAt(nn.Module):
    """A model whose loss, or only whose gradient, is NaN from one step on."""

    def __init__(self, bad_step, where):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.drop = nn.Dropout(0.5)
        self.bad_step, self.where, self.step = bad_step, where, 0

    def score(self, batch):
        bad = self.step == self.bad_step
        self.step += 1
        if bad and self.where == "loss":
            return Score(self.weight.sum() * math.nan, 0, 1)
        # The square root has slope infinity at 0, and infinity times 0 is NaN.
        return Score(self.weight.square().sum() + (torch.sqrt(self.weight.sum() * 0) if bad else 0), 0, 1)


@pytest.mark.parametrize("where, message", [("loss", "the loss is nan"), ("gradient", "the gradient norm is nan")])
def test_a_nan_names_its_step_and_leaves_the_weights_as_before_it(where, message):
    good, bad = NaNAt(99, where), NaNAt(3, where).eval()
    bad.drop.train()
    optimizer = torch.optim.SGD(bad.parameters(), lr=0.1)
    options = {"objective": lambda model, batch: model.score(batch), "schedule": "constant", "progress": False}
    fit(good, DATA, steps=3, warmup=0, optimizer=torch.optim.SGD(good.parameters(), lr=0.1), **options)
    with pytest.raises(FloatingPointError, match=f"{message} at step 3; the weights are still those before it. Lower"):
        fit(bad, DATA, steps=9, optimizer=optimizer, warmup=0, **options)
    assert torch.equal(bad.weight, good.weight) and bad.weight.isfinite().all()
    assert not bad.training and bad.drop.training  # the modes are restored all the same


def test_the_optimizers_rates_come_back_after_a_nan():
    bad = NaNAt(3, "loss")
    optimizer = torch.optim.SGD(bad.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError):
        fit(bad, DATA, steps=9, optimizer=optimizer, objective=lambda model, batch: model.score(batch), progress=False)
    assert optimizer.param_groups[0]["lr"] == 0.1


class Breaking(torch.optim.SGD):
    """An optimizer that fails in the middle of its third step, in one way or another."""

    steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        if self.steps == 3:
            self.param_groups[0]["params"][0].data.view(-1)[0] = self.value
            if self.value == 0.0:
                raise OSError("the machine stops")


@pytest.mark.parametrize(
    "value, error", [(math.nan, FloatingPointError), (-math.inf, FloatingPointError), (0.0, OSError)]
)
def test_a_step_that_breaks_the_weights_is_undone(value, error):
    model, twin = transformer(), transformer()
    model.register_buffer("seen", torch.zeros(()))
    optimizer = Breaking(model.parameters(), lr=0.1)
    optimizer.value = value

    def objective(model, batch):
        if hasattr(model, "seen"):
            model.seen += 1
        return answer_loss(model, batch)

    options = {"objective": objective, "schedule": "constant", "warmup": 0, "progress": False}
    fit(twin, DATA, steps=2, optimizer=torch.optim.SGD(twin.parameters(), lr=0.1), **options)
    with pytest.raises(error, match=r"norm of the new weights .* at step 2; the weights are still|the machine stops"):
        fit(model, DATA, steps=9, optimizer=optimizer, **options)
    assert same_bits(weights_of(twin), weights_of(model)) and model.seen == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_not_trained(dtype):
    model = transformer().to(dtype)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"embedding.token.weight is torch.*float16.* model.float\(\) trains it in 32"):
        fit(model, DATA, steps=2, progress=False)
    assert same_bits(before, weights_of(model))
    peft.attach(model, peft.LoRA(rank=2))
    fit(model, DATA, steps=1, progress=False)


def test_a_method_that_is_merged_or_off_is_not_left_out_beside_a_head():
    def headed():
        model = SequenceClassifier(transformer(), n_classes=11)
        return peft.attach(model, peft.LoRA(rank=2), train_also=("head",))

    options = {"steps": 1, "objective": label_loss, "progress": False}
    model = peft.merge(headed())
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"merged into the weights, .* unmerge\(model\) first"):
        fit(model, DATA, **options)
    assert same_bits(before, weights_of(model))
    fit(peft.unmerge(model), DATA, **options)
    with peft.disabled(model), pytest.raises(ValueError, match="leave disabled"):
        fit(model, DATA, **options)


def test_no_option_is_ignored():
    sgd = torch.optim.SGD(transformer().parameters(), lr=0.1)
    for name, value, beside in (
        ("learning_rate", 0.1, {"optimizer": sgd}),
        ("weight_decay", 0.0, {"optimizer": sgd}),
        ("betas", (0.9, 0.99), {"optimizer": sgd}),
        ("warmup", 1, {"schedule": lambda step: 1.0}),
        ("batch_size", 8, {"train": lambda step: DATA}),
        ("validate_every", 1, {}),
        ("every", 1, {}),
    ):
        options = {"train": DATA, "steps": 3, "progress": False, name: value} | beside
        with pytest.raises(ValueError, match=f"{name}=.* would be ignored, since it goes with"):
            fit(transformer(), **options)


def test_a_place_that_cannot_be_written_is_noticed_before_the_first_step(tmp_path):
    def objective(model, batch):
        raise AssertionError("a step was taken")

    (tmp_path / "folder").mkdir()
    for place, message in ((tmp_path / "missing" / "run", "make it first"), (tmp_path / "folder", "directory")):
        with pytest.raises(OSError, match=message):
            fit(transformer(), DATA, steps=3, checkpoint=place, objective=objective, progress=False)


def test_nothing_seeds_the_other_devices(monkeypatch):
    """`torch.manual_seed` moves the random state of every device, which the caller may be using."""
    for module in (torch, torch.random):
        monkeypatch.setattr(module, "manual_seed", lambda seed: pytest.fail("every device was seeded"))
    fit(transformer(dropout=0.5), DATA, steps=2, progress=False)


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_nothing_to_train_is_refused(own_optimizer):
    model = transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if own_optimizer else None
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train: no tensor requires a gradient. Attach a method first, or"):
        fit(model, DATA, steps=1, optimizer=optimizer, progress=False)


def test_an_optimizer_that_lacks_a_trainable_tensor_is_refused_with_its_name():
    model = transformer()
    some = [p for name, p in model.named_parameters() if not name.startswith("blocks.0.attention.key")]
    message = r"does not hold 2 trainable tensors \(blocks.0.attention.key.weight, blocks.0.attention.key.bias\)"
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        fit(model, DATA, steps=1, optimizer=torch.optim.SGD(some, lr=0.1), progress=False)
    assert same_bits(before, weights_of(model))
    check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps=0 must be a whole number, at least 1"),
        ({"batch_size": 65}, "batch_size=65 is more than the 64 rows of train"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
        ({"validate_every": 0}, "validate_every=0 must be a whole number, at least 1"),
        ({"schedule": "step"}, "schedule='step' is unknown; choose one of cosine, linear, constant"),
        ({"validation": DATA.rows(slice(0, 0))}, "validation is empty, .* give a Dataset with rows"),
        ({"train": DATA.rows(slice(0, 0))}, "train is empty, "),
        ({"clip": 0.0}, "clip=0.0 must be above 0; None never clips"),
        ({"clip": math.nan}, "clip=nan must be above 0"),
        ({"warmup": 3}, "warmup=3 must be shorter than the run of 3 steps"),
        ({"warmup": -1}, "warmup=-1 must be a whole number, at least 0"),
        ({"warmup": 2.5}, "warmup=2.5 must be a whole number, at least 0"),
        ({"steps": None}, "steps=None must be a whole number, at least 1"),
        ({"seed": None}, "seed=None must be a whole number, at least 0"),
        ({"accumulate": None}, "accumulate=None must be a whole number, at least 1"),
        ({"steps": 3.0}, "steps=3.0 must be a whole number, at least 1"),
        ({"batch_size": True}, "batch_size=True must be a whole number"),
    ],
)
def test_bad_options_are_refused(options, message, unchecked):
    options = {"train": DATA, "steps": 3, "progress": False} | options
    with pytest.raises(ValueError, match=message):
        fit(transformer(), **options)

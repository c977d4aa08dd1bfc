"""Training of language models: answers of several words, batches in parts, products in 16 bits."""

import pytest
import torch
import torch.nn.functional as F

from minitransformer import Transformer, TransformerConfig
from minitransformer.tasks.dataset import Dataset, pad_rows
from minitransformer.training import answer_only, evaluate, fit, training_step
from peft import LoRA, attach, trainable_parameters


def model(seed=0, **options):
    shape = {"vocab_size": 30, "max_len": 24, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32}
    return Transformer(TransformerConfig(**shape, init="unit_embedding", logit_scale=0.25, **options), seed=seed)


def questions(n=12, seed=0):
    """Rows of 6 to 14 words, whose last 1 to 4 words are the answer; answers are of unequal length on purpose."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 30, (6 + i % 9,), generator=generator).tolist() for i in range(n)]
    tokens, real = pad_rows(rows, 0)
    targets = torch.full_like(tokens, -100)
    for i, row in enumerate(rows):
        first = len(row) - 1 - i % 4  # of the answer
        targets[i, first - 1 : len(row) - 1] = torch.tensor(row[first:])
    return Dataset(tokens, real, targets)


def by_hand(logits, data):
    """Loss, right and asked words, one at a time: what follows each word, as Hugging Face's labels count it."""
    losses, right = [], 0
    for row, own in zip(logits, data.targets, strict=True):
        for scores, target in zip(row, own.tolist(), strict=True):
            if target != -100:
                losses.append(-(scores[target] - scores.logsumexp(dim=0)))
                right += int(scores.argmax() == target)
    return sum(losses) / len(losses), right, len(losses)


def test_only_the_answer_is_asked():
    net, data = model().double(), questions()
    score = answer_only(net, data)
    loss, right, asked = by_hand(net(data.tokens, data.padding_mask), data)
    assert (score.correct, score.count) == (right, asked)
    torch.testing.assert_close(score.loss, loss)
    own = torch.autograd.grad(score.loss, list(net.parameters()), allow_unused=True)
    for a, b in zip(own, torch.autograd.grad(loss, list(net.parameters()), allow_unused=True), strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_weighs_every_word_alike():
    net, data = model(), questions()
    loss, right, asked = by_hand(net(data.tokens, data.padding_mask), data)
    got = evaluate(net, data, answer_only, batch_size=5)
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert got["accuracy"] == right / asked


@pytest.mark.parametrize("parts", [2, 3, 5, 12])
def test_a_batch_in_parts_gives_the_step_of_the_whole(parts):
    after = {}
    for accumulate in (1, parts):
        net = attach(model().double(), LoRA(rank=2, alpha=4, targets=("query", "value", "up")), seed=1)
        trained = list(trainable_parameters(net).values())
        optimizer = torch.optim.SGD(trained, lr=0.5)
        scores = [training_step(net, questions(), answer_only, optimizer, trained, 0.1, s, accumulate) for s in (0, 1)]
        after[accumulate] = [*trained, *(x for s, norm in scores for x in (s.loss, torch.tensor(norm)))], scores
    for a, b in zip(after[1][0], after[parts][0], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-9, atol=1e-12)
    assert [(s.correct, s.count) for s, _ in after[1][1]] == [(s.correct, s.count) for s, _ in after[parts][1]]


def test_a_part_that_asks_nothing_counts_for_nothing():
    data = questions()
    silent = Dataset(data.tokens, data.padding_mask, data.targets.index_fill(0, torch.arange(6), -100))
    whole = {}
    for accumulate in (1, 2):
        net = attach(model(), LoRA(rank=2), seed=1)
        history = fit(net, silent, steps=2, batch_size=12, objective=answer_only, accumulate=accumulate, progress=False)
        whole[accumulate] = torch.tensor(history.loss + history.gradient_norm)
    torch.testing.assert_close(whole[1], whole[2], rtol=1e-6, atol=1e-6)


def test_in_float32_parts_agree_to_a_millionth():
    """Of three steps by SGD, whose steps are as long as the gradient: Adam's first ones would only know its sign."""
    trained = {}
    for accumulate in (1, 4):
        net = attach(model(), LoRA(rank=2), seed=1)
        own = list(trainable_parameters(net).values())
        optimizer = torch.optim.SGD(own, lr=0.1)
        fit(net, questions(), steps=3, batch_size=12, objective=answer_only, optimizer=optimizer, accumulate=accumulate,
            progress=False)  # fmt: skip
        trained[accumulate] = torch.cat([p.detach().flatten() for p in own])
    assert (trained[1] - trained[4]).abs().max() <= 1e-6 * trained[1].abs().max()


@pytest.mark.parametrize("half_base", [False, True])
def test_products_in_16_bits_train_what_is_of_32(half_base):
    seen = []
    net = model().to(torch.bfloat16) if half_base else model()
    net = attach(net, LoRA(rank=4, alpha=16, targets=("query", "value", "up", "down")), seed=1)
    net.blocks[0].feedforward.up.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    history = fit(net, questions(), steps=30, batch_size=12, learning_rate=2e-2, objective=answer_only, progress=False,
                  autocast=torch.bfloat16, seed=3)  # fmt: skip
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainable_parameters(net).values()} == {torch.float32}
    assert history.loss[-1] < 0.5 * history.loss[0]
    full = attach(model(), LoRA(rank=4, alpha=16, targets=("query", "value", "up", "down")), seed=1)
    of_32 = fit(
        full, questions(), steps=30, batch_size=12, learning_rate=2e-2, objective=answer_only, progress=False, seed=3
    )
    assert history.loss[0] == pytest.approx(of_32.loss[0], rel=0.03)


def test_validation_is_computed_as_training_is():
    net = attach(model(), LoRA(rank=2), seed=1)
    history = fit(net, questions(), questions(seed=5), steps=2, batch_size=12, objective=answer_only, progress=False,
                  autocast=torch.bfloat16)  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(net, questions(seed=5), answer_only)["loss"] == history.validation_loss[-1]


@pytest.mark.parametrize("change", [{"accumulate": 2}, {"autocast": torch.bfloat16}])
def test_a_run_that_is_computed_otherwise_is_another_run(change, tmp_path):
    options = {
        "steps": 2,
        "batch_size": 12,
        "objective": answer_only,
        "progress": False,
        "checkpoint": tmp_path / "run",
    }
    fit(attach(model(), LoRA(rank=2), seed=1), questions(), **options)
    with pytest.raises(ValueError, match=r"another run|accumulate|objective"):
        fit(attach(model(), LoRA(rank=2), seed=1), questions(), **options | change)


def test_what_is_no_answer_is_refused():
    data = questions()
    with pytest.raises(ValueError, match="answer_loss is for one word a row"):
        answer_only(model(), Dataset(data.tokens, data.padding_mask, data.targets[:, 0]))
    with pytest.raises(ValueError, match="causal=True"):
        answer_only(model(causal=False), data)
    with pytest.raises(ValueError, match=r"only torch\.bfloat16"):
        fit(model(), data, steps=1, objective=answer_only, batch_size=2, autocast=torch.float16)
    with pytest.raises(ValueError, match="accumulate=0"):
        fit(model(), data, steps=1, objective=answer_only, batch_size=2, accumulate=0)
    with pytest.raises(ValueError, match="do not fit together"):
        Dataset(data.tokens, data.padding_mask, data.targets[:, 1:])
    with pytest.raises(ValueError, match=r"ask padding for a word, .* make them -100 there"):
        answer_only(model(), Dataset(data.tokens, data.padding_mask, data.tokens.roll(-1, dims=1)))
    with pytest.raises(ValueError, match=r"autocast would be ignored: .* model\.float\(\) first"):
        fit(attach(model().double(), LoRA()), data, steps=1, objective=answer_only, autocast=torch.bfloat16)
    nothing = Dataset(data.tokens, data.padding_mask, torch.full_like(data.tokens, -100))
    for accumulate in (1, 3):
        with pytest.raises(ValueError, match="asks nothing"):
            fit(model(), nothing, steps=1, objective=answer_only, batch_size=12, accumulate=accumulate, progress=False)


def test_trimming_cuts_the_targets_too():
    data = questions()
    short = data.rows(torch.tensor([0, 1]))
    assert short.trimmed().targets.shape == short.trimmed().tokens.shape == (2, 7)
    torch.testing.assert_close(answer_only(model(), short).loss, answer_only(model(), short.trimmed()).loss)
    assert F.pad(short.trimmed().targets, (0, data.tokens.shape[1] - 7), value=-100).equal(short.targets)

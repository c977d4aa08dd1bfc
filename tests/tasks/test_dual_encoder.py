"""The dual encoder: scores against a NumPy twin, gradients against finite differences, and what padding may not do."""

import numpy as np
import pytest
import torch

from minitransformer.tasks.real.dual_encoder import DualEncoder

TEXTS = 4  # a question and three answers


@pytest.fixture
def model(tiny):
    return DualEncoder(tiny(), scale=7.0).double().eval()


def rows(n=3, length=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(23, (n, TEXTS, length), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (n, TEXTS, 1), generator=generator)
    return tokens, mask


def test_scores_are_scaled_cosines_of_mean_hidden_states(model):
    tokens, mask = rows()
    with torch.no_grad():
        scores = model(tokens, mask).numpy()
        for row in range(3):
            texts = [model.transformer.hidden(tokens[row, i, m][None])[0].numpy() for i, m in enumerate(mask[row])]
            question, *answers = (hidden.mean(axis=0) for hidden in texts)
            for score, answer in zip(scores[row], answers, strict=True):
                cosine = question @ answer / np.sqrt((question @ question) * (answer @ answer))
                assert score == pytest.approx(7.0 * cosine, rel=1e-9)


def test_gradient_equals_finite_differences(model):
    tokens, mask = rows()
    weight = model.transformer.blocks[0].attention.value.weight
    weights = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)

    def loss():
        return (model(tokens, mask) * weights).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (5, 11), (15, 3)):
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                weight[i, j] += step
                values.append(loss().item())
        with torch.no_grad():
            weight[i, j] += 1e-6
        assert gradient[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_neither_padding_nor_the_order_of_the_answers_matters(model):
    tokens, mask = rows()
    with torch.no_grad():
        scores = model(tokens, mask)
        wider = torch.nn.functional.pad(tokens, (0, 3), value=9), torch.nn.functional.pad(mask, (0, 3))
        torch.testing.assert_close(model(*wider), scores, rtol=1e-9, atol=1e-9)
        order = [0, 3, 1, 2]
        torch.testing.assert_close(model(tokens[:, order], mask[:, order]), scores[:, [2, 0, 1]], rtol=1e-9, atol=1e-9)


def test_an_answer_that_is_the_question_scores_highest(model):
    tokens, mask = rows()
    tokens[:, 2], mask[:, 2] = tokens[:, 0], mask[:, 0]
    with torch.no_grad():
        scores = model(tokens, mask)
    assert (scores.argmax(dim=1) == 1).all()
    torch.testing.assert_close(scores[:, 1], torch.full((3,), 7.0, dtype=torch.float64))


def test_it_brings_no_weight_of_its_own(model):
    assert all(name.startswith("transformer.") for name, _ in model.named_parameters())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_above_zero_is_refused(tiny, scale):
    with pytest.raises(ValueError, match="scale must be above 0"):
        DualEncoder(tiny(), scale=scale)


@pytest.mark.parametrize("n_parts", [1, 3, 50], ids=["one part", "three", "more than texts"])
def test_texts_encoded_in_parts_of_like_length_are_those_encoded_at_once(model, n_parts):
    tokens, mask = (own.flatten(0, 1) for own in rows())
    torch.testing.assert_close(model.embeddings(tokens, mask, n_parts), model.embedding(tokens, mask))


def test_an_answer_is_not_padded_to_the_length_of_a_question(model, monkeypatch):
    tokens, mask = rows(n=6)
    mask[:, 0], mask[:, 1:, 2:] = True, False  # questions of 6 words, answers of at most 2
    sizes, inner = [], model.transformer.hidden
    monkeypatch.setattr(model.transformer, "hidden", lambda own, *rest: sizes.append(own.numel()) or inner(own, *rest))
    model(tokens, mask)
    assert sum(sizes) <= 6 * 6 + 3 * 6 * 2 + 4 * 4  # the last is for the part that holds both kinds

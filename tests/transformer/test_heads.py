import numpy as np
import pytest
import torch
from reference.numpy_transformer import NumpyTransformer
from reference.random_weights import randomize

from minitransformer import SequenceClassifier
from minitransformer.heads import first_real, mean_pool

TOKENS = torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9]])
REAL = torch.tensor([[True, True, True, False], [False, False, True, True]])


def numpy_twin(model):
    return NumpyTransformer({name: p.detach().double().numpy() for name, p in model.named_parameters()}, model.config)


@pytest.mark.parametrize("options", [{"logit_scale": 0.3}, {"lm_head": "bert", "activation": "relu"}], ids=str)
def test_word_scores_follow_the_heads_formula(tiny, options):
    model = tiny(**options)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(model.lm_head(hidden).detach(), numpy_twin(model).lm_head(hidden.numpy()), atol=1e-5)


def test_the_tied_head_has_no_weight_of_its_own_and_trains_the_embedding(tiny):
    model = tiny()
    assert not list(model.head.parameters())
    model.lm_head(torch.ones(1, 16))[0, 7].backward()
    assert torch.equal(model.embedding.token.weight.grad[7], torch.ones(16))


def test_chosen_rows_get_the_same_scores_as_all(tiny):
    model = tiny()
    hidden = model.hidden(TOKENS, REAL)
    torch.testing.assert_close(model.lm_head(hidden[:, -1]), model(TOKENS, REAL)[:, -1])


def test_a_model_without_a_head_says_so(tiny):
    model = tiny(lm_head="none")
    with pytest.raises(ValueError, match=r"no language-model head .*use model.hidden\(...\)"):
        model(TOKENS)


def test_the_mean_is_taken_over_real_tokens():
    hidden = torch.arange(16.0).view(2, 4, 2)
    assert mean_pool(hidden, REAL).tolist() == [[2.0, 3.0], [13.0, 14.0]]
    assert mean_pool(hidden).tolist() == [[3.0, 4.0], [11.0, 12.0]]


def test_the_first_real_token_is_found_behind_left_padding():
    hidden = torch.arange(16.0).view(2, 4, 2)
    assert first_real(hidden, REAL).tolist() == [[0.0, 1.0], [12.0, 13.0]]
    assert first_real(hidden).tolist() == [[0.0, 1.0], [8.0, 9.0]]


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_class_scores_are_a_linear_map_of_the_pooled_hidden_state(tiny, pool):
    model = tiny()
    classifier = randomize(SequenceClassifier(model, n_classes=3, pool=pool))
    hidden = numpy_twin(model).hidden(TOKENS.numpy(), REAL.numpy())
    rows = [hidden[row, REAL[row].numpy()] for row in range(2)]
    pooled = np.stack([row.mean(axis=0) if pool == "mean" else row[0] for row in rows])
    expected = pooled @ classifier.head.weight.detach().numpy().T + classifier.head.bias.detach().numpy()
    np.testing.assert_allclose(classifier(TOKENS, REAL).detach(), expected, atol=1e-5)


def test_features_are_what_the_head_reads(tiny):
    model = SequenceClassifier(tiny(), n_classes=3).eval()
    features = model.features(TOKENS, REAL)
    assert features.shape == (2, 16)
    assert torch.equal(model.head(features), model(TOKENS, REAL))


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_class_scores_do_not_depend_on_padding(tiny, pool):
    classifier = SequenceClassifier(tiny(), n_classes=2, pool=pool).eval()
    alone = torch.cat([classifier(TOKENS[row, REAL[row]][None]) for row in range(2)])
    torch.testing.assert_close(classifier(TOKENS, REAL), alone, atol=1e-6, rtol=1e-5)


def test_dropout_of_the_classifier_is_active_in_training_only(tiny):
    classifier = SequenceClassifier(tiny(), n_classes=2, dropout=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(classifier.train()(TOKENS, REAL), classifier(TOKENS, REAL))
    assert torch.equal(classifier.eval()(TOKENS, REAL), classifier(TOKENS, REAL))


@pytest.mark.parametrize(
    "options, message",
    [({"pool": "last"}, "pool='last' is unknown; choose"), ({"n_classes": 1}, "n_classes must be at least 2, got 1")],
)
def test_bad_options_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(tiny(), **({"n_classes": 2} | options))

import pytest
import torch
from reference.random_weights import randomize

from minitransformer import TransformerConfig
from minitransformer.cache import KVCache
from minitransformer.embedding import Embedding, positions

SIZES = {"vocab_size": 7, "max_len": 5, "d_model": 8, "n_heads": 2}
TOKENS = torch.tensor([[1, 4, 4, 0], [6, 2, 0, 0]])
REAL = torch.tensor([[True, True, True, True], [True, True, False, False]])


def embedding(**changes):
    return randomize(Embedding(TransformerConfig(**SIZES, **changes)))


def test_a_word_vector_is_the_sum_of_its_tables():
    e = embedding(n_segments=2)
    segments = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    expected = e.token.weight[4] + e.position.weight[2] + e.segment.weight[1]
    torch.testing.assert_close(e(TOKENS, REAL, segments)[0, 2], expected)


def test_left_out_segments_are_all_0():
    e = embedding(n_segments=2)
    assert torch.equal(e(TOKENS, REAL), e(TOKENS, REAL, torch.zeros_like(TOKENS)))


def test_what_is_hooked_to_the_segments_sees_those_that_are_left_out():
    e = embedding(n_segments=2)
    e.segment.register_forward_hook(lambda *seen: 2 * seen[-1])
    torch.testing.assert_close(e(TOKENS, REAL), e(TOKENS, REAL, torch.zeros_like(TOKENS)))


@pytest.mark.usefixtures("unchecked")
def test_segments_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"segments must have the shape of tokens, \(2, 4\), got \(1, 4\)"):
        embedding(n_segments=2)(TOKENS, REAL, torch.zeros(1, 4, dtype=torch.long))


def test_the_sum_is_normalised_where_asked():
    plain, normed = embedding(), embedding(embedding_norm=True)
    plain.load_state_dict(normed.state_dict(), strict=False)
    torch.testing.assert_close(normed(TOKENS, REAL), normed.norm(plain(TOKENS, REAL)))


@pytest.mark.parametrize(
    "real, expected",
    [([1, 1, 1, 1], [0, 1, 2, 3]), ([1, 1, 0, 0], [0, 1, 1, 1]), ([0, 0, 1, 1], [0, 0, 0, 1])],
    ids=["full", "right", "left"],
)
def test_positions_count_real_tokens_only(real, expected):
    real = torch.tensor([real]).bool()
    assert positions(torch.ones_like(real).long(), real).tolist() == [expected]


def test_without_padding_one_row_of_positions_stands_for_all():
    e = embedding()
    assert positions(TOKENS).tolist() == [[0, 1, 2, 3]]
    assert torch.equal(e(TOKENS), e(TOKENS, torch.ones_like(TOKENS).bool()))


@pytest.mark.parametrize("mask_now", [True, False], ids=["with a mask", "without one"])
def test_positions_go_on_behind_a_cache(mask_now):
    cache, new = KVCache(n_layers=1), torch.ones(2, 2, dtype=torch.long)
    cache.count(3, torch.tensor([[True, True, True], [False, False, True]]))
    assert positions(new, new.bool() if mask_now else None, cache).tolist() == [[3, 4], [1, 2]]
    cache.count(2, new.bool() if mask_now else None)
    assert positions(new, cache=cache).tolist() == [[5, 6], [3, 4]]


def test_positions_go_on_behind_a_cache_without_padding():
    cache = KVCache(n_layers=1)
    cache.count(3, None)
    assert positions(TOKENS, cache=cache).tolist() == [[3, 4, 5, 6]]
    padded = torch.tensor([[False, True, True, True]] * 2)
    assert positions(TOKENS, padded, cache).tolist() == [[2, 3, 4, 5]] * 2


def test_dropout_is_active_in_training_only():
    e = embedding(dropout=0.5)
    with torch.random.fork_rng():
        dropped = e.train()(TOKENS, REAL)
    assert (dropped == 0).float().mean() > 0.2
    assert (e.eval()(TOKENS, REAL) == 0).sum() == 0


@pytest.mark.parametrize(
    "tokens, segments, n_segments, message",
    [
        ([7], None, 0, r"tokens range from 7 to 7, but the vocabulary has 7 words \(0 to 6\); encode the text with"),
        ([-1], None, 0, "tokens range from -1 to -1"),
        ([1] * 6, None, 0, "6 positions, but max_len is 5; shorten the text"),
        ([1], [0], 0, "no segment table .config.n_segments is 0.; leave them out"),
        ([1], [2], 2, r"segments range from 2 to 2, but the model has 2 \(0 to 1\); number the segments from 0"),
    ],
)
def test_bad_input_is_refused(tokens, segments, n_segments, message):
    tokens = torch.tensor([tokens])
    segments = None if segments is None else torch.tensor([segments])
    with pytest.raises(ValueError, match=message):
        embedding(n_segments=n_segments)(tokens, torch.ones_like(tokens).bool(), segments)


def test_padding_does_not_count_towards_max_len():
    real = torch.tensor([[False] * 3 + [True] * 5])
    assert embedding()(torch.ones(1, 8, dtype=torch.long), real).shape == (1, 8, 8)

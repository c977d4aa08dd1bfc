import pytest
import torch

from minitransformer.tasks.dataset import Dataset, Example, pad_rows, split_of
from minitransformer.tasks.toy.world import world_vocabulary


def small_split():
    examples = [
        Example(("mary", "is", "in", "rome", "."), "rome", "person"),
        Example(("where", "?"), "paris", "object"),
        Example(("mary", "?"), "oslo", "person"),
    ]
    return split_of(examples, world_vocabulary())


def test_rows_are_padded_on_the_right():
    tokens, padding_mask = pad_rows([[5, 6, 7], [8]], pad_id=0)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert padding_mask.tolist() == [[True, True, True], [True, False, False]]


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        pad_rows([], pad_id=0)


def test_rows_picks_rows():
    split = small_split()
    picked = split.rows(torch.tensor([2, 0]))
    assert len(split) == 3 and len(picked) == 2
    assert torch.equal(picked.targets, split.targets[[2, 0]])
    assert torch.equal(picked.tokens, split.tokens[[2, 0]])
    assert torch.equal(picked.padding_mask, split.padding_mask[[2, 0]])
    assert len(split.rows(slice(0, 2))) == 2


def test_a_split_shows_its_words():
    split = small_split()
    assert split.text(1) == "<bos> where ?"
    assert split.answer(1) == "paris"
    assert split.kinds == ("person", "object", "person")


def test_of_kind():
    split = small_split()
    assert torch.equal(split.of_kind("person").targets, split.targets[[0, 2]])
    with pytest.raises(ValueError, match="the kinds are object, person"):
        split.of_kind("colour")


def test_tensors_that_do_not_fit_are_refused(unchecked):
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="do not fit together"):
        Dataset(tokens, mask, torch.zeros(3, dtype=torch.int64))


def test_a_row_of_padding_only_is_refused():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    with pytest.raises(ValueError, match="no real token"):
        Dataset(tokens, mask, torch.zeros(2, dtype=torch.int64))


def test_a_row_of_several_texts_is_as_long_as_the_longest_and_trimmed_with_it():
    lengths = torch.tensor([[2, 1], [1, 4], [3, 3]])  # of two texts in each of three rows
    mask = torch.arange(6) < lengths[..., None]
    dataset = Dataset(torch.arange(36).view(3, 2, 6), mask, torch.tensor([0, 1, 0]))
    assert dataset.lengths.tolist() == [2, 4, 3]
    picked = dataset.rows(torch.tensor([2, 0])).trimmed()
    assert picked.tokens.shape == picked.padding_mask.shape == (2, 2, 3)
    assert torch.equal(picked.tokens, dataset.tokens[[2, 0], :, :3])
    assert torch.equal(picked.padding_mask.sum(-1), lengths[[2, 0]])
    with pytest.raises(ValueError, match="no real token"):
        Dataset(dataset.tokens, mask & torch.tensor([True, False])[None, :, None], dataset.targets)


def test_the_length_of_a_row_is_that_of_its_text():
    assert small_split().lengths.tolist() == small_split().padding_mask.sum(dim=1).tolist() == [6, 3, 3]

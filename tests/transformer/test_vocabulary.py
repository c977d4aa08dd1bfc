import pytest
import torch

from minitransformer.vocabulary import Vocabulary


@pytest.fixture
def vocabulary():
    return Vocabulary(["mary", "went", "to", "paris", ".", "where", "is", "?"])


def test_special_tokens_come_first(vocabulary):
    assert vocabulary.words[:2] == ("<pad>", "<bos>")
    assert (vocabulary.pad_id, vocabulary.bos_id) == (0, 1)
    assert len(vocabulary) == 10


def test_encode_a_text_as_a_reader_types_it(vocabulary):
    assert vocabulary.encode("Mary went to Paris. Where is Mary?") == [2, 3, 4, 5, 6, 7, 8, 2, 9]
    assert vocabulary.encode("<bos> mary") == [1, 2]


def test_encode_a_list_of_words(vocabulary):
    assert vocabulary.encode(["paris", "?"]) == [5, 9]
    assert vocabulary.encode(word for word in ("is", ".")) == [8, 6]


def test_decode_undoes_encode_and_leaves_padding_out(vocabulary):
    text = "mary went to paris ."
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode(torch.tensor([1, 2, 0, 0])) == "<bos> mary"


def test_every_word_has_its_own_id(vocabulary):
    assert [vocabulary.id(word) for word in vocabulary.words] == list(range(len(vocabulary)))


def test_an_unknown_word_names_the_nearest_known_ones(vocabulary):
    with pytest.raises(ValueError, match=r"'pariss' is not in the vocabulary.*did you mean paris"):
        vocabulary.encode("mary went to pariss .")


def test_an_unknown_word_like_no_other_points_to_the_list(vocabulary):
    with pytest.raises(ValueError, match=r"'xylophone'.*Vocabulary\.words"):
        vocabulary.encode("xylophone")


@pytest.mark.parametrize("ids", [[10], [-1]])
def test_an_id_outside_the_vocabulary_is_refused(vocabulary, ids):
    with pytest.raises(ValueError, match="ids run from 0 to 9"):
        vocabulary.decode(ids)


def test_a_word_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"twice: is"):
        Vocabulary(["is", "in", "is"])


def test_it_is_printed_with_its_size(vocabulary):
    assert "10 words" in repr(vocabulary)

"""Both tasks: answers are right, splits disjoint, seeded and balanced, and counting words does not help."""

import pytest
import torch
from reference.shares import worst

from minitransformer.tasks import (
    bag_of_words_accuracy,
    encode_question,
    encode_review,
    qa_splits,
    sentiment_splits,
    world_vocabulary,
)
from minitransformer.tasks.toy.bag_of_words import bag_of_words
from minitransformer.tasks.toy.qa import QUESTION_SHARES
from minitransformer.tasks.toy.world import ARRIVALS, LABELS, MOVES, NAMES, OBJECTS


@pytest.fixture(scope="module")
def qa(splits):
    return splits("qa")


@pytest.fixture(scope="module")
def sentiment(splits):
    return splits("sentiment")


@pytest.fixture(params=["qa", "sentiment"])
def task(request, qa, sentiment):
    return {"qa": qa, "sentiment": sentiment}[request.param]


def texts(split):
    return {split.text(index) for index in range(len(split))}


def test_train_validation_and_test_are_disjoint(task, unchecked):
    train, validation, test = texts(task.train), texts(task.validation), texts(task.test)
    assert (len(train), len(validation), len(test)) == (10_000, 1_000, 2_000)
    assert not train & validation and not train & test and not validation & test


@pytest.mark.parametrize("splits", [qa_splits, sentiment_splits])
def test_the_seed_decides_the_texts(splits):
    sizes = (50, 10, 10)
    one, same, other = splits(1, sizes), splits(1, sizes), splits(2, sizes)
    assert torch.equal(one.test.tokens, same.test.tokens) and torch.equal(one.test.targets, same.test.targets)
    assert texts(one.train) != texts(other.train)


def test_splits_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    qa_splits(0, (5, 1, 1))
    sentiment_splits(0, (5, 1, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_rows_are_short_and_open_with_bos(task):
    for split in (task.train, task.validation, task.test):
        assert split.tokens.shape[1] <= 72
        assert (split.tokens[:, 0] == task.vocabulary.bos_id).all()
        assert ((split.tokens != task.vocabulary.pad_id) == split.padding_mask).all()


def test_answers_are_among_the_answer_words(task):
    assert set(task.train.targets.tolist()) == set(task.answer_ids.tolist())


def read_story(text):
    """A reader independent of the generator: the answer to the question at the end of a story."""
    words = text.removeprefix("<bos> ").split()
    *sentences, question = " ".join(words).split(" . ")
    places, holders, colours, moves = {}, {}, {}, {}
    for sentence in sentences:
        parts = sentence.split()
        if parts[1] in MOVES:
            places[parts[0]] = parts[-1]
            moves[parts[0]] = moves.get(parts[0], 0) + 1
        elif parts[2] in ARRIVALS:
            holders[parts[1]] = parts[-1]
        else:
            assert parts[2] == "is"
            colours[parts[1]] = parts[-1]
    asked = question.split()
    subject = asked[-2]
    if asked[0] == "who":
        return holders[subject], "holder", moves
    if asked[0] == "what":
        return colours[subject], "colour", moves
    if subject in OBJECTS:
        return places[holders[subject]], "object", moves
    assert subject in NAMES
    return places[subject], "person", moves


def test_qa_answers_are_right_and_at_least_two_people_move_more_than_once(qa):
    for index in range(len(qa.test)):
        answer, kind, moves = read_story(qa.test.text(index))
        assert answer == qa.test.answer(index), qa.test.text(index)
        assert kind == qa.test.kinds[index]
        assert len(moves) in (2, 3)
        assert sum(count > 1 for count in moves.values()) >= 2


def of_splits(task, field):
    return [list(getattr(own, field)) for own in (task.train, task.validation, task.test)]


def assert_shares(task):
    """Of every kind, every answer and every pair of them: in each split, and in each half of it."""
    kinds, answers = ([own for split in of_splits(task, field) for own in split] for field in ("kinds", "targets"))
    halves = [(place, i < len(own) // 2) for place, own in enumerate(of_splits(task, "kinds")) for i in range(len(own))]
    for marks in (kinds, answers := [int(answer) for answer in answers], list(zip(kinds, answers, strict=True))):
        assert worst(marks, [split for split, _ in halves]) < 5  # one in a million, for hundreds of shares
        assert worst(marks, halves) < 5


def test_every_kind_has_its_share_of_every_split_and_of_its_first_rows(task):
    """The first rows of a split stand for it where all of them would take long."""
    assert_shares(task)


@pytest.mark.parametrize("splits", [qa_splits, sentiment_splits])
@pytest.mark.parametrize(("seed", "sizes"), [(1, (300, 400, 2_000)), (2, (501, 501, 501))])
def test_so_it_has_with_other_seeds_and_sizes(splits, seed, sizes, unchecked):
    assert_shares(splits(seed, sizes))


def test_what_is_drawn_in_order_fails_the_test_of_shares():
    """The oracle notices what it is for: 15% of the early rows, and 5% of the late ones."""
    kinds = ["rare" if i % 100 < (15 if i < 10_000 else 5) else "other" for i in range(13_000)]
    parts = [(i >= 10_000) + (i >= 11_000) for i in range(13_000)]
    assert worst(kinds, parts) > 9 and worst(kinds, [i % 3 for i in range(13_000)]) < 5


def test_qa_kinds_have_their_shares(qa):
    for kind, share in QUESTION_SHARES.items():
        assert qa.train.kinds.count(kind) / len(qa.train) == pytest.approx(share, abs=0.02)


def test_sentiment_labels_are_balanced(sentiment):
    for split in (sentiment.train, sentiment.validation, sentiment.test):
        positive = (split.targets == sentiment.vocabulary.id(LABELS[0])).float().mean().item()
        assert positive == pytest.approx(0.5, abs=0.001)


def test_counting_words_does_not_find_the_sentiment(sentiment):
    accuracy = bag_of_words_accuracy(sentiment)
    assert 0.4 < accuracy["test"] < 0.6
    assert 0.4 < accuracy["validation"] < 0.6


def test_bag_of_words_counts_words_and_not_padding(sentiment):
    counts = bag_of_words(sentiment.test, len(sentiment.vocabulary))
    assert torch.equal(counts.sum(dim=1), sentiment.test.padding_mask.sum(dim=1).float())
    words = sentiment.test.text(0).split()
    assert counts[0, sentiment.vocabulary.id("the")] == words.count("the")


def test_bag_of_words_learns_what_words_do_tell():
    """The baseline is no straw man: where single words decide, it finds them."""
    task = sentiment_splits(0, (1_000, 50, 200))
    good, bad = task.vocabulary.encode("good bad")
    for split in (task.train, task.validation, task.test):
        split.tokens[:, 1] = torch.where(split.targets == task.answer_ids[0], good, bad)
    assert bag_of_words_accuracy(task)["test"] > 0.9


def test_a_question_typed_by_the_reader_becomes_the_row_of_the_task(qa):
    typed = qa.test.text(0).removeprefix("<bos> ")
    own = qa.test.tokens[0][qa.test.padding_mask[0]]
    assert encode_question(typed)[0].tolist() == own.tolist()


def test_a_review_typed_by_the_reader_becomes_the_row_of_the_task(sentiment):
    typed = sentiment.test.text(0).removeprefix("<bos> ").removesuffix(" so the sentiment is")
    own = sentiment.test.tokens[0][sentiment.test.padding_mask[0]]
    assert encode_review(typed)[0].tolist() == own.tolist()


def test_bad_sentences_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r'ends with "\?"'):
        encode_question("mary went to paris .")
    with pytest.raises(ValueError, match="did you mean paris"):
        encode_question("mary went to pariss . where is mary ?")
    with pytest.raises(ValueError, match="type one"):
        encode_review("")


def test_the_vocabulary_has_between_100_and_300_words():
    assert 100 <= len(world_vocabulary()) <= 300

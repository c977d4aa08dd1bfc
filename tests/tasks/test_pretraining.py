import re
from collections import Counter

import pytest
import torch

from minitransformer.tasks.toy.pretraining import DOCUMENTS, pretraining_rows
from minitransformer.tasks.toy.world import (
    ARRIVALS,
    BAD,
    COLOURS,
    DISPLEASED,
    GOOD,
    LABELS,
    NAMES,
    OBJECTS,
    PLEASED,
    WORDS,
    world_vocabulary,
)

EVERYTHING = {kind: 1.0 for kind in DOCUMENTS}
VOCABULARY = world_vocabulary()


def documents(kind, n_rows=400):
    """Whole documents of one kind, as lists of words (the last of each row may be cut, and is dropped)."""
    rows = pretraining_rows(VOCABULARY, {kind: 1.0}, n_rows, 128, seed=3, step=0)
    found = []
    for row in rows:
        found += [text.split() for text in VOCABULARY.decode(row).split("<bos>")[1:-1]]
    return found


def test_rows_are_a_function_of_seed_and_step():
    def rows(seed, step):
        return pretraining_rows(VOCABULARY, EVERYTHING, 4, 64, seed=seed, step=step)

    assert torch.equal(rows(0, 7), rows(0, 7))
    assert not torch.equal(rows(0, 7), rows(0, 8))
    assert not torch.equal(rows(0, 7), rows(1, 7))
    assert rows(0, 0).shape == (4, 64)


def test_the_format_of_the_tasks_never_occurs():
    rows = pretraining_rows(VOCABULARY, EVERYTHING, 300, 128, seed=0, step=0)
    text = [VOCABULARY.decode(row) for row in rows]
    assert not any("?" in row for row in text)
    assert not any("the sentiment is" in row for row in text)
    assert not any(question in row for row in text for question in ("where is", "who has", "what colour"))


def test_every_word_but_the_question_mark_occurs():
    rows = pretraining_rows(VOCABULARY, EVERYTHING, 1000, 128, seed=0, step=0)
    seen = {VOCABULARY.words[index] for index in rows.unique().tolist()}
    assert set(WORDS) - seen == {"?"}


def test_label_words_are_tied_to_no_opinion():
    """After a review, both labels follow good and bad verdicts alike."""
    counts = Counter()
    for words in documents("review"):
        label = next((word for word in words if word in LABELS), None)
        outcome = next(word for word in words if word in PLEASED + DISPLEASED)
        if label:
            counts[outcome in PLEASED, label] += 1
    total = sum(counts.values())
    assert total > 200
    for count in counts.values():
        assert count / total == pytest.approx(0.25, abs=0.08)


def test_half_of_the_reviews_are_single_clauses():
    adjectives = [sum(word in GOOD + BAD for word in words) for words in documents("review")]
    assert adjectives.count(1) / len(adjectives) == pytest.approx(0.5, abs=0.05)


def told_and_asked(words):
    """The pairs of the first and of the second half of a document."""
    pairs = [tuple(words[index : index + 2]) for index in range(0, len(words), 2)]
    return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]


def test_pairs_are_told_twice():
    for words in documents("pairs", 50):
        told, asked = told_and_asked(words)
        assert sorted(told) == sorted(asked)
        assert len({first for first, _ in told}) == len(told)


def test_chains_join_object_to_place_through_its_holder():
    for words in documents("chains", 50):
        told, asked = told_and_asked(words)
        facts = dict(told)
        for first, second in asked:
            assert second == (facts[first] if first in NAMES else facts[facts[first]])
        assert any(first in OBJECTS for first, _ in asked)


def test_inventories_tell_colour_and_holder_of_every_object():
    for words in documents("inventory", 50):
        text = " ".join(words)
        arrivals = [index for index, word in enumerate(words) if word in ARRIVALS]
        assert 2 <= len(arrivals) <= 4
        recap = " ".join(words[arrivals[-1] + 4 :])
        for index in arrivals:
            thing, holder = words[index - 1], words[index + 2]
            forms = (f"{thing} is with {holder}", f"{holder} has the {thing}")
            forms += tuple(f"holder of the {thing} is {now}{holder}" for now in ("", "now ", "still "))
            assert any(form in recap for form in forms)
            assert len(re.findall(rf"{thing} is ({'|'.join(COLOURS)})", text)) == 2


def test_errands_end_with_the_place_of_every_object():
    for words in documents("errands", 50):
        places, holders = {}, {}
        for sentence in " ".join(words).removesuffix(" .").split(" . "):
            parts = [word for word in sentence.split() if word not in ("the", "of", "is", "in", "now", "still", "to")]
            if parts[0] in NAMES:
                places[parts[0]] = parts[-1]
            elif parts[1] in ARRIVALS:
                holders[parts[0]] = parts[-1]
            else:
                thing, place = parts[-2:]
                assert place == places[holders.pop(thing)]
        assert all(holder not in places for holder in holders.values())


def test_the_mixture_is_a_share_of_the_text():
    mixture = {"story": 0.5, "pairs": 0.5}
    rows = pretraining_rows(VOCABULARY, mixture, 300, 128, seed=0, step=0)
    lengths = Counter()
    for row in rows:
        for text in VOCABULARY.decode(row).split("<bos>")[1:]:
            words = text.split()
            lengths["story" if "to" in words else "pairs"] += len(words)
    assert lengths["story"] / sum(lengths.values()) == pytest.approx(0.5, abs=0.12)


def test_an_unknown_kind_of_document_is_refused():
    with pytest.raises(ValueError, match=r"poems; there are story, review"):
        pretraining_rows(VOCABULARY, {"poems": 1.0}, 1, 8, seed=0, step=0)

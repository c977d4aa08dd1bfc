import csv
from collections import Counter

import pytest
import torch
from reference.shares import worst

from minitransformer.tasks.real.reuters import CLASSES, reuters_splits, stories


def texts_of(task):
    return [set(split.texts) for split in (task.train, task.validation, task.test)]


def test_the_files_hold_the_standard_split(reuters):
    """The counts that Cardoso-Cachopo 2007 gives for R8."""
    train, test = stories()
    assert (len(train), len(test)) == (5_485, 2_189)
    counts = {"acq": (1596, 696), "crude": (253, 121), "earn": (2840, 1083), "grain": (41, 10)}
    counts |= {"interest": (190, 81), "money-fx": (206, 87), "ship": (108, 36), "trade": (251, 75)}
    found = [Counter(subject for _, subject in rows) for rows in (train, test)]
    assert {subject: (found[0][subject], found[1][subject]) for subject in CLASSES} == counts
    assert sum(map(sum, counts.values())) == 5_485 + 2_189


def test_the_test_part_is_whole_and_no_text_of_it_is_trained_on(reuters):
    train, validation, test = texts_of(reuters)
    assert list(reuters.test.texts) == [text for text, _ in stories()[1]]
    assert not train & validation and not train & test and not validation & test
    assert len(reuters.train) == len(train) and len(reuters.validation) == len(validation)
    assert (len(train), len(validation)) == (4_877, 542)


def test_each_subject_has_its_share_of_the_validation_stories(reuters):
    """The test part is not drawn: it is the later weeks of the standard split, and has other shares."""
    splits = (reuters.train, reuters.validation)
    parts = [part for part, own in enumerate(splits) for _ in own.texts]
    assert worst([target for own in splits for target in own.targets.tolist()], parts) < 4


def test_targets_and_tokens_belong_to_the_texts(reuters, tokenizer):
    subject = {text: subject for part in stories() for text, subject in part}
    for split in (reuters.train, reuters.validation, reuters.test):
        for i in (0, 7, len(split) - 1):
            assert split.answer(i) == subject[split.text(i)]
            whole = tokenizer.encode(split.text(i)).ids
            ids = split.tokens[i][split.padding_mask[i]].tolist()
            assert ids == (whole if len(whole) <= 128 else [*whole[:127], whole[-1]])


def test_the_seed_decides_what_is_kept_for_validation(reuters):
    other = reuters_splits(seed=1)
    assert texts_of(other)[1] != texts_of(reuters)[1] and other.test.texts == reuters.test.texts
    assert texts_of(other)[0] | texts_of(other)[1] == texts_of(reuters)[0] | texts_of(reuters)[1]
    short = reuters_splits(max_tokens=9)
    assert short.train.tokens.shape[1] == 9 and short.train.texts == reuters.train.texts
    assert torch.equal(short.test.targets, reuters.test.targets)


def test_the_readers_limit_of_others_stays(reuters):
    before = csv.field_size_limit()
    stories()
    assert csv.field_size_limit() == before


def test_no_room_for_a_word_is_refused(reuters):
    with pytest.raises(ValueError, match="max_tokens=2"):
        reuters_splits(max_tokens=2)

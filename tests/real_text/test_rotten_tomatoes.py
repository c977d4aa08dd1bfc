from itertools import combinations

import pytest
import torch
from reference.shares import worst

from minitransformer.tasks.real.rotten_tomatoes import CLASSES, rotten_tomatoes_splits, snippets, split_films

FILMS = [f"film {i}" for i in range(156)]


def splits_of(task):
    return task.train, task.validation, task.test


def test_every_snippet_is_there_once(real_text):
    rows = snippets()
    assert len(rows) == 4_863  # of 4,866 in the file, three occur twice
    assert len({row.text for row in rows}) == len(rows)
    assert len({row.film for row in rows}) == 156
    assert {row.verdict for row in rows} == set(CLASSES)
    assert sum(row.verdict == "fresh" for row in rows) == 2_455 - 2  # one of the three is rotten


def test_no_film_and_no_text_is_in_two_splits(task):
    for a, b in combinations(splits_of(task), 2):
        assert not set(a.films) & set(b.films)
        assert not set(a.texts) & set(b.texts)
        assert not {tuple(row.tolist()) for row in a.tokens} & {tuple(row.tolist()) for row in b.tokens}


def test_counts(task):
    assert [len(split) for split in splits_of(task)] == [3_393, 470, 1_000]
    assert [len(set(split.films)) for split in splits_of(task)] == [109, 16, 31]
    for split in splits_of(task):
        assert 0.45 < split.targets.float().mean() < 0.55
        assert split.tokens.shape[1] <= 64


def test_each_verdict_has_its_share_of_every_split(task):
    """As far as chance allows where whole films are drawn, which critics agree about."""
    splits = splits_of(task)
    parts = [part for part, own in enumerate(splits) for _ in own.films]
    films = [film for own in splits for film in own.films]
    assert worst([target for own in splits for target in own.targets.tolist()], parts, films) < 4


def test_targets_texts_and_tokens_belong_together(task, tokenizer):
    by_text = {row.text: row for row in snippets()}
    for split in splits_of(task):
        for i in (0, len(split) // 2, len(split) - 1):
            row = by_text[split.text(i)]
            assert (split.answer(i), split.films[i]) == (row.verdict, row.film)
            assert split.tokens[i][split.padding_mask[i]].tolist() == tokenizer.encode(row.text).ids[:64]
    assert task.classes == ("rotten", "fresh")


def test_a_split_is_a_data_set(task):
    batch = task.test.rows(torch.tensor([3, 5])).trimmed()
    assert len(batch) == 2 and batch.padding_mask.any(dim=0).all()
    assert torch.equal(batch.targets, task.test.targets[[3, 5]])


def test_rows_can_be_cut_shorter(task):
    short = rotten_tomatoes_splits(max_tokens=16).test
    assert short.tokens.shape[1] == 16
    assert short.texts == task.test.texts


def test_the_seed_decides_which_films_go_where():
    first, again, other = split_films(FILMS, 0), split_films(FILMS, 0), split_films(FILMS, 1)
    assert first == again
    assert first[2] != other[2]
    assert [len(part) for part in first] == [109, 16, 31]
    assert set.union(*first) == set(FILMS)


def test_max_tokens_without_room_is_refused(real_text):
    with pytest.raises(ValueError, match="max_tokens=2"):
        rotten_tomatoes_splits(max_tokens=2)

from random import Random

import pytest
import torch
from reference.shares import worst

from minitransformer.tasks.real.quiz import PLACES, Clue, choices_of, clues, quiz_splits, split_shows, wrong_answers


def splits_of(task):
    return task.train, task.validation, task.test


def test_unusable_clues_are_dropped_and_each_is_there_once(quiz):
    rows = clues()
    assert len(rows) == len({row.text for row in rows}) == 22_840
    assert len({row.category for row in rows}) == 100
    for row in rows:
        assert row.answer and "<" not in row.text + row.answer and len(row.text.split()) >= 4
        assert "\\\\'" not in row.text + row.answer


def test_no_show_and_no_clue_is_in_two_splits(quiz):
    show = {row.text: row.show for row in clues()}
    shows = [{show[text] for text in split.texts} for split in splits_of(quiz)]
    assert not shows[0] & shows[1] and not shows[0] & shows[2] and not shows[1] & shows[2]
    assert [len(set(split.texts)) for split in splits_of(quiz)] == [3_000, 500, 1_000]


def test_the_wrong_answers_are_of_the_same_category_and_wrong(quiz):
    by_text = {row.text: row for row in clues()}
    answers = {}
    for row in by_text.values():
        answers.setdefault(row.category, set()).add(row.answer.lower())
    for split in splits_of(quiz):
        for i, choices in enumerate(split.choices):
            row = by_text[split.text(i)]
            assert split.answer(i) == row.answer
            assert len({choice.lower() for choice in choices}) == 4
            assert {choice.lower() for choice in choices} <= answers[row.category]


def test_no_place_is_right_more_often_than_the_others(quiz):
    for split in splits_of(quiz):
        shares = split.targets.bincount(minlength=4) / len(split)
        assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / len(split)) ** 0.5


def test_each_category_has_its_share_of_every_split(quiz):
    """As far as chance allows where whole shows are drawn; a show asks several clues of a category."""
    by_text = {row.text: row for row in clues()}
    rows = [(part, by_text[text]) for part, own in enumerate(splits_of(quiz)) for text in own.texts]
    parts, categories, shows = zip(*((part, row.category, row.show) for part, row in rows), strict=True)
    assert worst(categories, parts, shows) < 5  # of 300 small shares


def test_tokens_belong_to_the_texts(quiz, tokenizer):
    split = quiz.test
    assert split.tokens.shape[:2] == (1_000, 5)
    for i in (0, 123, 999):
        texts = [split.text(i), *split.choices[i]]
        for text, row, mask in zip(texts, split.tokens[i], split.padding_mask[i], strict=True):
            assert row[mask].tolist() == tokenizer.encode(text).ids
    part = split.rows(torch.tensor([3, 5])).trimmed()
    assert part.tokens.shape == (2, 5, int(split.lengths[[3, 5]].max()))
    assert torch.equal(part.padding_mask.sum(-1), split.padding_mask[[3, 5]].sum(-1))


def test_the_encoder_answers_far_better_than_chance_before_any_training(quiz, model):
    """The order of texts and targets cannot be wrong then."""
    from minitransformer.tasks.real.dual_encoder import DualEncoder
    from minitransformer.training import evaluate, label_loss

    assert evaluate(DualEncoder(model), quiz.test.rows(slice(100)), objective=label_loss)["accuracy"] > 0.6


# Without the package


def test_the_seed_decides_which_shows_go_where():
    shows = range(200, 300)
    first, again, other = split_shows(shows, 0), split_shows(reversed(shows), 0), split_shows(shows, 1)
    assert first == again != other
    assert [len(part) for part in first] == [65, 15, 20] and set.union(*first) == set(shows)


def test_an_answer_that_differs_in_capitals_is_no_wrong_answer():
    rows = [Clue("a clue of four words", word, "Fish", 1) for word in ("Cod", "cod", "Eel", "Ray", "Tuna")]
    pools = wrong_answers([*rows, Clue("one more of these clues", "Oak", "Trees", 1)])
    assert pools == {"Fish": ["Cod", "Eel", "Ray", "Tuna"], "Trees": ["Oak"]}
    seen = {choices_of(rows[1], pools["Fish"], Random(seed)) for seed in range(50)}
    assert all(sorted(choices) == ["Eel", "Ray", "Tuna", "cod"] for choices in seen)
    assert {choices.index("cod") for choices in seen} == set(range(len(PLACES)))


def test_more_questions_than_clues_are_refused(quiz):
    with pytest.raises(ValueError, match="30000 questions are asked for, but the shows of that split have"):
        quiz_splits(sizes=(30_000, 1, 1))

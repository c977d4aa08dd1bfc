from random import Random

import pytest

from minitransformer.tasks.toy.reviews import KINDS, review
from minitransformer.tasks.toy.world import BAD, GOOD


def polarity_of(clause):
    """+1 or -1, read from a clause by the rules of the language, not by the generator."""
    if "but" in clause:
        clause = clause[clause.index("but") + 1 :]
    adjective = next(word for word in clause if word in GOOD + BAD)
    sign = 1 if adjective in GOOD else -1
    return -sign if "not" in clause else sign


def verdict_of(words):
    """The main clause of a whole review."""
    words = [word for word in words if word != "."]
    if words[0] == "although":
        return polarity_of(words[words.index(",") + 1 :])
    if "although" in words:
        return polarity_of(words[: words.index("although")])
    if "and" in words:
        return polarity_of(words[: words.index("and")])
    return polarity_of(words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("good", [True, False])
def test_the_verdict_is_that_of_the_main_clause(kind, good):
    for seed in range(50):
        words = review(Random(seed), good, kind)
        assert verdict_of(words) == (1 if good else -1), words


@pytest.mark.parametrize("good", [True, False])
def test_contrast_and_concession_oppose_their_clauses(good):
    for seed in range(50):
        words = review(Random(seed), good, "contrast")
        border = words.index("but")
        assert polarity_of(words[:border]) == -polarity_of(words[border:])
        words = review(Random(seed), good, "agreement")
        border = words.index("and")
        assert polarity_of(words[:border]) == polarity_of(words[border:])


def test_denial_is_a_probability():
    never = [review(Random(seed), True, "single", denial=0.0) for seed in range(50)]
    always = [review(Random(seed), True, "single", denial=1.0) for seed in range(50)]
    assert not any("not" in words for words in never)
    assert all("not" in words for words in always)

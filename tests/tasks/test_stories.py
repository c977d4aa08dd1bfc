from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from minitransformer.tasks.toy import recaps as recaps_module
from minitransformer.tasks.toy.stories import Arrival, Move, Paint, story_steps, tell
from minitransformer.tasks.toy.world import World


def played(*steps):
    world = World()
    words = [word for step in steps for word in tell(step, world)]
    return world, words


def test_a_story_is_told_in_words():
    _, words = played(Move("mary", "went", "paris"), Arrival("apple", "came", "tom"), Paint("apple", "red"))
    assert " ".join(words) == "mary went to paris . the apple came to tom . the apple is red ."


def test_the_latest_place_counts_and_objects_follow_their_holder():
    world, _ = played(
        Move("mary", "went", "paris"),
        Arrival("apple", "came", "mary"),
        Paint("apple", "red"),
        Move("tom", "went", "rome"),
        Move("mary", "moved", "oslo"),
    )
    assert world.places == {"mary": "oslo", "tom": "rome"}
    assert world.place_of_object("apple") == "oslo"
    assert world.located_objects() == ["apple"]
    assert world.holders == {"apple": "mary"} and world.colours == {"apple": "red"}


def test_an_object_is_nowhere_until_its_holder_has_a_place():
    world, _ = played(Arrival("apple", "came", "mary"), Paint("apple", "red"))
    assert world.place_of_object("apple") is None and world.located_objects() == []
    for seed in range(20):
        sentences = recaps_module.recaps(Random(seed), world)
        assert len(sentences) == 2  # colour and holder
        assert all("place" not in sentence and "in" not in sentence for sentence in sentences)


@pytest.mark.parametrize("seed", range(20))
def test_story_steps_keep_the_counts_and_never_stay(seed):
    steps = story_steps(Random(seed), [2, 3, 1], n_objects=2)
    moves = [step for step in steps if isinstance(step, Move)]
    assert sorted(Counter(move.person for move in moves).values()) == [1, 2, 3]
    for kind in (Arrival, Paint):
        assert len({step.thing for step in steps if isinstance(step, kind)}) == 2
    for person in {move.person for move in moves}:
        places = [move.place for move in moves if move.person == person]
        assert all(before != after for before, after in pairwise(places))


@pytest.mark.parametrize("seed", range(30))
def test_recaps_are_true(seed):
    """Read each recap with rules of the test's own and compare it with the world."""
    random = Random(seed)
    world = World()
    for step in story_steps(random, [2, 2], n_objects=2):
        tell(step, world)
    for sentence in recaps_module.recaps(random, world):
        filler = ("the", "of", "in", "now", "still", "is", ".", "with")
        words = [word for word in sentence if word not in filler]
        if words[0] in ("place", "colour", "holder"):
            subject, value = words[1], words[2]
        elif words[1] == "has":
            subject, value = words[2], words[0]
        else:
            subject, value = words
        if subject in world.places:
            facts = {world.places[subject]}
        else:
            facts = {world.place_of_object(subject), world.holders[subject], world.colours[subject]}
        assert value in facts, sentence


@pytest.mark.parametrize("seed", range(10))
def test_relative_recaps_are_true_and_ask_nothing(seed):
    world, _ = played(Move("mary", "went", "paris"), Arrival("apple", "came", "mary"))
    sentence = " ".join(recaps_module.relative_recap(Random(seed), world))
    assert sentence in (
        "paris is where mary is .", "mary is who the apple came to .", "the apple is what mary has ."
    )  # fmt: skip

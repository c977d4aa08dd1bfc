"""Reviews: opinions with negation and contrast, where the verdict is not the count of good and bad words.

    the plot was not dull .                               good: "not" turns the adjective round
    the cast was not clumsy but charming .                good: "but" follows a denial and agrees with it
    the film was good but the ending was awful .          bad:  the clause after "but" decides
    although the play was dull , the music was great .    good: the main clause decides,
    the music was great although the play was dull .            wherever it stands

Every clause is denied as often as not, so that a word alone says nothing about the verdict.
"""

from random import Random

from minitransformer.tasks.toy.world import BAD, GOOD, TOPICS

KINDS = ("single", "correction", "agreement", "contrast", "concession")


def adjective(random: Random, good: bool) -> str:
    """An adjective of the wanted polarity."""
    return random.choice(GOOD if good else BAD)


def clause(random: Random, topic: str, good: bool, denied: bool) -> list[str]:
    """A clause that says something good (or bad) of a topic, by a denial of the opposite if `denied`."""
    if denied:
        return ["the", topic, "was", "not", adjective(random, not good)]
    emphasis = [random.choice(("very", "quite", "truly"))] if random.random() < 0.3 else []
    return ["the", topic, "was", *emphasis, adjective(random, good)]


def correction(random: Random, topic: str, good: bool) -> list[str]:
    """A clause of the form "not dull but charming"."""
    return ["the", topic, "was", "not", adjective(random, not good), "but", adjective(random, good)]


def review(random: Random, good: bool, kind: str, denial: float = 0.5) -> list[str]:
    """A review whose verdict is `good`, ending with a full stop.

    Args:
        kind: one of `KINDS`. Contrast and concession have two clauses of opposite polarity.
        denial: the probability that a clause is a denial.
    """
    first, second = random.sample(TOPICS, 2)
    if kind == "single":
        return [*clause(random, first, good, random.random() < denial), "."]
    if kind == "correction":
        return [*correction(random, first, good), "."]
    main = clause(random, first, good, random.random() < denial)
    if kind == "agreement":
        return [*main, "and", *clause(random, second, good, random.random() < denial), "."]
    minor = clause(random, second, not good, random.random() < denial)
    if kind == "contrast":
        return [*minor, "but", *main, "."]
    if random.random() < 0.5:
        return ["although", *minor, ",", *main, "."]
    return [*main, "although", *minor, "."]

"""The pretraining text: documents of several kinds, packed into rows of token ids.

    story        steps with recaps in between, then a recap of everything
    review       an opinion, then what it led to ("so tom smiled ."), then perhaps a fact of no relation
    pairs        bare pairs, told twice: "mary paris apple red apple red mary paris"
    chains       bare pairs that join: "mary paris apple mary mary paris apple paris"
    inventory    whose things are and of which colour, told twice
    errands      people go somewhere, things come to people, then where each thing is: two steps, nothing else
    facts        numbers, signs, words: contexts for the words of the tasks that say nothing about opinions

Pairs look silly, and decide everything: they make the model form its induction circuit (find the earlier
mention, copy what came with it), which the stories then use. Stories alone never formed it.
"""

from collections.abc import Mapping
from random import Random

import torch
from jaxtyping import Int
from torch import Tensor

from minitransformer.tasks.toy.recaps import (
    colour_recap,
    holder_recap,
    object_recap,
    place_recap,
    recaps,
    relative_recap,
)
from minitransformer.tasks.toy.reviews import review
from minitransformer.tasks.toy.stories import Paint, object_steps, story_steps, tell
from minitransformer.tasks.toy.world import (
    COLOURS,
    DISPLEASED,
    LABELS,
    MENTIONED,
    NAMES,
    NUMBERS,
    OBJECTS,
    PLACES,
    PLEASED,
    QUESTION_WORDS,
    World,
)
from minitransformer.vocabulary import Vocabulary

RECAP_RATE = 0.3  # the probability of a recap after a step of a story


def story_document(random: Random) -> list[str]:
    """A story of one to three people and up to two objects, with recaps in between and at the end."""
    n_people = random.choices((1, 2, 3), (1, 4, 5))[0]
    moves_of = [random.choices((1, 2, 3), (3, 5, 2))[0] for _ in range(n_people)]
    world = World()
    words: list[str] = []
    for step in story_steps(random, moves_of, n_objects=random.choices((0, 1, 2), (1, 3, 6))[0]):
        words += tell(step, world)
        if random.random() < RECAP_RATE:
            words += recap_of_the_moment(random, world)
    for sentence in recaps(random, world):
        words += sentence
    return words


def recap_of_the_moment(random: Random, world: World) -> list[str]:
    """A true recap in the middle of a story, half of the time of where an object is by now."""
    located = world.located_objects()
    if random.random() < 0.05 and world.places:
        return relative_recap(random, world)
    if located and random.random() < 0.5:
        return object_recap(random, world, random.choice(located))
    if world.holders and random.random() < 0.3:
        return holder_recap(random, world, random.choice(list(world.holders)))
    if world.colours and random.random() < 0.15:
        return colour_recap(random, world, random.choice(list(world.colours)))
    if world.places:
        return place_recap(random, world, random.choice(list(world.places)))
    return []


def review_document(random: Random) -> list[str]:
    """A review, what it led to, and sometimes a fact that is independent of it.

    Half of the reviews are single clauses with few denials: without them the model never learns which
    adjectives are good. The fact at the end shows the label words after good and bad reviews alike, so that
    they stay neutral.
    """
    good = random.random() < 0.5
    if random.random() < 0.5:
        words = review(random, good, "single", denial=0.1)
    else:
        words = review(random, good, random.choice(("correction", "agreement", "contrast", "concession")))
    outcomes = random.sample(PLEASED if good else DISPLEASED, 2)
    people = random.sample(NAMES, 2)
    words += ["so", people[0], outcomes[0]]
    if random.random() < 0.5:
        words += [*random.choice((["and"], [",", "then"])), people[1], outcomes[1]]
    words += ["."]
    if random.random() < 0.25:
        words += fact(random)
    return words


def inventory_document(random: Random) -> list[str]:
    """Two to four objects come to people and have colours; then everything is told again."""
    people = random.sample(NAMES, random.randint(2, 3))
    world = World()
    words = [word for step in object_steps(random, people, random.randint(2, 4)) for word in tell(step, world)]
    return words + [word for sentence in recaps(random, world) for word in sentence]


def errands_document(random: Random) -> list[str]:
    """Two to four people move once or twice, two to four objects come to them; then where each object is.

    The places of the people are not told again, so the place of an object can only be found in two steps.
    """
    moves_of = [random.choices((1, 2), (3, 2))[0] for _ in range(random.randint(2, 4))]
    world = World()
    words: list[str] = []
    for step in story_steps(random, moves_of, n_objects=random.randint(2, 4)):
        if not isinstance(step, Paint):
            words += tell(step, world)
    objects = world.located_objects()
    for thing in random.sample(objects, len(objects)):
        words += object_recap(random, world, thing)
    return words


def random_pairs(random: Random) -> list[tuple[str, str]]:
    """Two to six pairs with different first words: name-place, object-name, object-colour or object-place."""
    firsts = random.sample(NAMES + OBJECTS, random.randint(2, 6))
    seconds = [PLACES if first in NAMES else random.choice((NAMES, COLOURS, PLACES)) for first in firsts]
    return [(first, random.choice(second)) for first, second in zip(firsts, seconds, strict=True)]


def listed(random: Random, pairs: list[tuple[str, str]]) -> list[str]:
    """The words of all pairs, the pairs in random order."""
    return [word for pair in random.sample(pairs, len(pairs)) for word in pair]


def pairs_document(random: Random) -> list[str]:
    """Pairs listed twice, in two orders."""
    pairs = random_pairs(random)
    return listed(random, pairs) + listed(random, pairs)


def chains_document(random: Random) -> list[str]:
    """Name-place and object-name pairs, then each name's place and, through the name, each object's place."""
    people = random.sample(NAMES, random.randint(2, 4))
    place_of = {person: random.choice(PLACES) for person in people}
    holder_of = {thing: random.choice(people) for thing in random.sample(OBJECTS, random.randint(1, 3))}
    places_of_objects = {thing: place_of[person] for thing, person in holder_of.items()}
    told = listed(random, [*place_of.items(), *holder_of.items()])
    return told + listed(random, [*place_of.items(), *places_of_objects.items()])


def fact(random: Random) -> list[str]:
    """A sentence about numbers, signs or words. The sign of a number is a coin toss."""
    form = random.randrange(3)
    if form == 0:
        return ["the", "number", random.choice(NUMBERS), "is", random.choice(LABELS), "."]
    if form == 1:
        position = random.randrange(len(NUMBERS) - 1)
        return ["after", NUMBERS[position], "comes", NUMBERS[position + 1], "."]
    word = random.choice(QUESTION_WORDS + MENTIONED)
    return ["a", "long" if len(word) > 5 else "short", "word", ":", word, "."]


def facts_document(random: Random) -> list[str]:
    """One to three facts."""
    return [word for _ in range(random.randint(1, 3)) for word in fact(random)]


DOCUMENTS = {
    "story": story_document,
    "review": review_document,
    "pairs": pairs_document,
    "chains": chains_document,
    "inventory": inventory_document,
    "errands": errands_document,
    "facts": facts_document,
}
MEAN_LENGTHS = {  # words, roughly
    "story": 100, "review": 16, "pairs": 17, "chains": 21, "inventory": 75, "errands": 60, "facts": 12,
}  # fmt: skip


def pretraining_rows(
    vocabulary: Vocabulary,
    mixture: Mapping[str, float],
    n_rows: int,
    length: int,
    *,
    seed: int,
    step: int,
) -> Int[Tensor, "n_rows length"]:
    """Rows of documents, each opened by `<bos>`, packed one after the other and cut at `length`.

    A pure function of its arguments: any step of any run can be made again.

    Args:
        mixture: share of each kind of document among the tokens, by name (see `DOCUMENTS`); short documents
            are drawn more often, so that the shares come out as shares of the text.

    Raises:
        ValueError: the mixture names a kind of document that does not exist.
    """
    unknown = set(mixture) - set(DOCUMENTS)
    if unknown:
        raise ValueError(f"no such documents: {', '.join(sorted(unknown))}; there are {', '.join(DOCUMENTS)}")
    random = Random(f"{seed}/{step}")
    kinds = list(mixture)
    draws = [mixture[kind] / MEAN_LENGTHS[kind] for kind in kinds]
    rows = []
    for _ in range(n_rows):
        row: list[int] = []
        while len(row) < length:
            document = DOCUMENTS[random.choices(kinds, draws)[0]](random)
            row += [vocabulary.bos_id, *vocabulary.encode(document)]
        rows.append(row[:length])
    return torch.tensor(rows, dtype=torch.int64)

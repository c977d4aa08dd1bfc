"""Recaps: true statements about a world, the form in which pretraining tells what a story implies.

    mary is in rome . the place of the apple is oslo . the holder of the apple is tom .

Each fact comes in several word orders, so that the model learns to look the fact up from a distance and not
from one fixed position. None is a question: the tasks' format is never seen in pretraining.
"""

from random import Random

from minitransformer.tasks.toy.world import World


def place_recap(random: Random, world: World, person: str) -> list[str]:
    """Where a person is."""
    place = world.places[person]
    return random.choice(
        (
            [person, "is", "in", place, "."],
            [person, "is", random.choice(("now", "still")), "in", place, "."],
            ["the", "place", "of", person, "is", place, "."],
            ["the", "place", "of", person, "is", random.choice(("now", "still")), place, "."],
        )
    )


def object_recap(random: Random, world: World, thing: str) -> list[str]:
    """Where an object is, through its holder: the statement that needs two steps."""
    place = world.place_of_object(thing)
    return random.choice(
        (
            ["the", thing, "is", "in", place, "."],
            ["the", thing, "is", random.choice(("now", "still")), "in", place, "."],
            ["the", "place", "of", "the", thing, "is", place, "."],
            ["the", "place", "of", "the", thing, "is", random.choice(("now", "still")), place, "."],
        )
    )


def colour_recap(random: Random, world: World, thing: str) -> list[str]:
    """What colour an object has."""
    colour = world.colours[thing]
    return random.choice(
        (
            ["the", thing, "is", colour, "."],
            ["the", "colour", "of", "the", thing, "is", colour, "."],
        )
    )


def holder_recap(random: Random, world: World, thing: str) -> list[str]:
    """Who has an object."""
    person = world.holders[thing]
    return random.choice(
        (
            ["the", thing, "is", "with", person, "."],
            ["the", "holder", "of", "the", thing, "is", person, "."],
            ["the", "holder", "of", "the", thing, "is", random.choice(("now", "still")), person, "."],
            [person, "has", "the", thing, "."],
        )
    )


def relative_recap(random: Random, world: World) -> list[str]:
    """A statement with a relative clause: the words `where`, `who` and `what`, outside of any question."""
    forms = [[place, "is", "where", person, "is", "."] for person, place in world.places.items()]
    for thing, person in world.holders.items():
        forms.append([person, "is", "who", "the", thing, "came", "to", "."])
        forms.append(["the", thing, "is", "what", person, "has", "."])
    return random.choice(forms)


def recaps(random: Random, world: World) -> list[list[str]]:
    """One recap for every fact that is known, in random order: places, objects' places, colours, holders."""
    sentences = [place_recap(random, world, person) for person in world.places]
    sentences += [object_recap(random, world, thing) for thing in world.located_objects()]
    sentences += [holder_recap(random, world, thing) for thing in world.holders]
    sentences += [colour_recap(random, world, thing) for thing in world.colours]
    random.shuffle(sentences)
    return sentences

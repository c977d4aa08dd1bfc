"""Stories: people move about, things come to people, things have colours; one sentence each.

    mary went to paris . the apple came to tom . mary moved to rome . the apple is red . tom walked to oslo .

A story is a list of steps; `tell` plays a step in a `World` and returns its words. Pretraining and question
answering share this file, and differ in what they add: pretraining states what is true (`recaps.py`), the
task asks (`qa.py`).
"""

from dataclasses import dataclass
from random import Random

from minitransformer.tasks.toy.world import ARRIVALS, COLOURS, MOVES, NAMES, OBJECTS, PLACES, World


@dataclass(frozen=True)
class Move:
    """Someone goes somewhere."""

    person: str
    verb: str
    place: str


@dataclass(frozen=True)
class Arrival:
    """An object comes to someone, who keeps it."""

    thing: str
    verb: str
    person: str


@dataclass(frozen=True)
class Paint:
    """An object has a colour."""

    thing: str
    colour: str


Step = Move | Arrival | Paint


def story_steps(random: Random, moves_of: list[int], n_objects: int) -> list[Step]:
    """A story of `len(moves_of)` people, of whom the i-th moves `moves_of[i]` times, and `n_objects` objects.

    The order is random. No move repeats the place where the person is already.
    """
    people = random.sample(NAMES, len(moves_of))
    steps: list[Step] = []
    turns = [person for person, count in zip(people, moves_of, strict=True) for _ in range(count)]
    random.shuffle(turns)
    place_of: dict[str, str] = {}
    for person in turns:
        place_of[person] = random.choice([place for place in PLACES if place != place_of.get(person)])
        steps.append(Move(person, random.choice(MOVES), place_of[person]))
    for step in object_steps(random, people, n_objects):
        steps.insert(random.randrange(len(steps) + 1), step)
    return steps


def object_steps(random: Random, people: list[str], n_objects: int) -> list[Step]:
    """Different objects, each with a colour, each coming to one of the people; in random order."""
    steps: list[Step] = []
    for thing in random.sample(OBJECTS, n_objects):
        steps.append(Arrival(thing, random.choice(ARRIVALS), random.choice(people)))
        steps.append(Paint(thing, random.choice(COLOURS)))
    random.shuffle(steps)
    return steps


def tell(step: Step, world: World) -> list[str]:
    """Play one step in `world` (which changes) and return the sentence that tells it."""
    if isinstance(step, Move):
        world.places[step.person] = step.place
        return [step.person, step.verb, "to", step.place, "."]
    if isinstance(step, Arrival):
        world.holders[step.thing] = step.person
        return ["the", step.thing, step.verb, "to", step.person, "."]
    world.colours[step.thing] = step.colour
    return ["the", step.thing, "is", step.colour, "."]

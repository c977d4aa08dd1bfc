"""From a sentence to JSON: what small models are tuned for is to keep to a format.

    Ada Brown is 34 years old, lives in Oslo and works as a nurse.
    Write this as JSON with the keys city, name, age.                -> {"city": "Oslo", "name": "Ada Brown", "age": 34}

Three kinds of sentence (a person, an order, a visit), each in several wordings; which keys are wanted, two to four of
them, and in which order is drawn. No name occurs in two splits: whoever learned the names by heart gains nothing.
"""

import json
from collections.abc import Sequence
from random import Random

from minitransformer.tasks.language.pairs import LanguageTask, Pair, ask, check_sizes
from minitransformer.tasks.real.text import held_out

FORENAMES = (
    "Ada", "Ben", "Carla", "Dora", "Elias", "Fiona", "George", "Hanna", "Igor", "Jane", "Karl", "Lena", "Mario", "Nina",
    "Otto", "Paula", "Quentin", "Rosa", "Simon", "Tara", "Ursula", "Victor", "Wendy", "Yusuf",
)  # fmt: skip
SURNAMES = (
    "Adams", "Brown", "Cohen", "Diaz", "Evans", "Fischer", "Garcia", "Hughes", "Ivanov", "Jensen", "Kim", "Lopez",
    "Meyer", "Novak", "Olsen", "Patel", "Quinn", "Rossi", "Silva", "Tanaka", "Usman", "Vogel", "Weber", "Young",
)  # fmt: skip
VALUES = {  # what can be said of somebody, besides the name
    "age": tuple(range(18, 90)),
    "city": ("Oslo", "Rome", "Paris", "London", "Berlin", "Madrid", "Vienna", "Lisbon", "Dublin", "Prague", "Athens"),
    "job": ("nurse", "teacher", "baker", "carpenter", "pilot", "doctor", "gardener", "lawyer", "painter", "chemist"),
    "item": ("lamps", "chairs", "bicycles", "books", "mirrors", "clocks", "tables", "blankets", "bottles", "cameras"),
    "count": tuple(range(2, 30)),
    "price": tuple(range(20, 1_000)),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "time": tuple(f"{hour}:{minute}" for hour in range(9, 20) for minute in ("00", "15", "30", "45")),
}
WORDINGS = {
    "person": (
        "{name} is {age} years old, lives in {city} and works as a {job}.",
        "{name}, {age}, is a {job} in {city}.",
        "At the age of {age}, {name} moved to {city} and became a {job}.",
        "In {city} there is a {job} called {name}, who has just turned {age}.",
    ),
    "order": (
        "{name} ordered {count} {item} for {price} euros.",
        "For {price} euros, {name} bought {count} {item}.",
        "We sent {count} {item} to {name}, who paid {price} euros.",
        "The bill says {price} euros: {count} {item}, sold to {name}.",
    ),
    "visit": (
        "{name} will be in {city} on {day} at {time}.",
        "On {day} at {time}, {name} arrives in {city}.",
        "We meet {name} in {city}; it is set for {time} on {day}.",
        "The train to {city} leaves on {day} at {time}, and {name} is on it.",
    ),
}
KEYS = {
    "person": ("name", "age", "city", "job"),
    "order": ("name", "item", "count", "price"),
    "visit": ("name", "city", "day", "time"),
}
SHARES = (0.7, 0.1, 0.2)  # of the names
SIZES = (2_000, 200, 200)
MOST = 100_000  # far fewer than the requests that a split's names allow, so drawing again until one is new ends soon


def records_splits(seed: int = 0, sizes: tuple[int, int, int] = SIZES) -> LanguageTask:
    """The task: conversations of one request; the answer is a JSON object, compared by `same_record`.

    Args:
        seed: of names and sentences.
        sizes: how many sentences train, validation and test have.

    Raises:
        ValueError: a split without sentences, or more than 100,000 in all.
    """
    check_sizes(sizes, MOST)
    everybody = [f"{first} {last}" for first in FORENAMES for last in SURNAMES]
    splits = {}
    for split, names, n in zip(
        ("train", "validation", "test"), held_out(everybody, SHARES, f"records/{seed}"), sizes, strict=True
    ):
        random, pairs = Random(f"records/{seed}/{split}"), {}
        while len(pairs) < n:
            pair = _request(sorted(names), random)
            pairs.setdefault(pair.prompt[0]["content"], pair)
        splits[split] = tuple(pairs.values())
    return LanguageTask("records", matches=same_record, **splits)


def same_record(said: str, answer: str) -> bool:
    """Whether `said` is JSON and nothing else, with the keys and values of the answer, each once, in any order.

    34, 34.0 and "34" are three different values.
    """
    try:
        record = json.loads(said, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError):
        return False
    return json.dumps(record, sort_keys=True) == json.dumps(json.loads(answer), sort_keys=True)


def _request(names: Sequence[str], random: Random) -> Pair:
    kind = random.choice(tuple(WORDINGS))
    known = {key: random.choice(names if key == "name" else VALUES[key]) for key in KEYS[kind]}
    keys = random.sample(KEYS[kind], random.choice((2, 3, 4)))
    sentence = random.choice(WORDINGS[kind]).format(**known)
    answer = json.dumps({key: known[key] for key in keys})
    return ask(f"{sentence}\nWrite this as JSON with the keys {', '.join(keys)}.", answer, kind)


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)

"""The toy world: who and what there is, where people are, who holds what, what colour things are.

The same lists make the words of the vocabulary, the texts of the pretraining and the two tasks.
"""

from dataclasses import dataclass, field

from minitransformer.vocabulary import Vocabulary

NAMES = ("mary", "john", "tom", "anna", "paul", "lucy", "peter", "emma", "jack", "sara", "david", "nina")
PLACES = (
    "paris", "rome", "london", "berlin", "oslo", "madrid", "vienna", "cairo",
    "lima", "dublin", "prague", "athens", "tokyo", "delhi", "boston", "sydney",
)  # fmt: skip
OBJECTS = ("apple", "ball", "lamp", "cup", "hat", "key", "box", "coin")
COLOURS = ("red", "green", "blue", "yellow", "black", "white")

MOVES = ("went", "moved", "walked", "travelled")
ARRIVALS = ("came", "passed", "fell")
STORY_WORDS = ("to", "the", "is", "in", "now", "still", "has", "with", "of", "place", "holder", "colour")
QUESTION_WORDS = ("where", "who", "what")

TOPICS = ("film", "play", "song", "novel", "show", "plot", "acting", "music", "ending", "cast")
GOOD = (
    "good", "great", "superb", "charming", "funny", "clever", "gripping", "wonderful", "brilliant", "lovely",
)  # fmt: skip
BAD = ("bad", "awful", "dull", "boring", "weak", "poor", "clumsy", "silly", "dreadful", "terrible")
PLEASED = ("smiled", "laughed", "clapped", "cheered")
DISPLEASED = ("sighed", "frowned", "yawned", "groaned")
REVIEW_WORDS = ("was", "not", "but", "and", "although", "very", "quite", "truly", "so", "then")

LABELS = ("positive", "negative")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MENTIONED = ("number", "word", "sentiment", "review", "question", "answer")
FACT_WORDS = (*MENTIONED, "short", "long", "after", "comes", "a")
PUNCTUATION = (".", ",", ":", "?")

WORDS = (
    *PUNCTUATION, *NAMES, *PLACES, *OBJECTS, *COLOURS, *MOVES, *ARRIVALS, *STORY_WORDS, *QUESTION_WORDS,
    *TOPICS, *GOOD, *BAD, *PLEASED, *DISPLEASED, *REVIEW_WORDS, *LABELS, *NUMBERS, *FACT_WORDS,
)  # fmt: skip


def world_vocabulary() -> Vocabulary:
    """The vocabulary of the toy world. Ids are stable: the shipped backbone depends on them."""
    return Vocabulary(WORDS)


@dataclass
class World:
    """What is true at one moment of a story.

    An object has no place of its own: it is wherever its holder is. That makes "where is the apple ?" a
    question of two steps, object -> holder -> the holder's latest place.
    """

    places: dict[str, str] = field(default_factory=dict)  # person -> latest place
    holders: dict[str, str] = field(default_factory=dict)  # object -> person
    colours: dict[str, str] = field(default_factory=dict)  # object -> colour

    def place_of_object(self, thing: str) -> str | None:
        """Where an object is, through its holder; None as long as the holder's place has not been told."""
        return self.places.get(self.holders[thing])

    def located_objects(self) -> list[str]:
        """The objects whose place is known."""
        return [thing for thing in self.holders if self.place_of_object(thing) is not None]

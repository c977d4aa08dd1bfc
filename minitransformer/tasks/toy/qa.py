"""Question answering: a story of two or three movers, a question, one answer word.

    mary went to paris . the apple came to tom . tom moved to rome . ... where is the apple ?

Four kinds of question: `person` (the latest of several places), `object` (two steps: who holds it, and where
is the holder now), `colour` and `holder`.
"""

from random import Random

from minitransformer.tasks.dataset import Example, Task, task_of
from minitransformer.tasks.toy.stories import story_steps, tell
from minitransformer.tasks.toy.world import COLOURS, NAMES, PLACES, World, world_vocabulary

QUESTION_SHARES = {"person": 0.40, "object": 0.30, "colour": 0.15, "holder": 0.15}
MOVES_OF_TWO = ((2, 2), (2, 3), (3, 2), (3, 3))
MOVES_OF_THREE = ((2, 2, 1), (2, 2, 2))
SPLIT_SIZES = (10_000, 1_000, 2_000)  # train, validation, test


def qa_example(random: Random) -> Example:
    """A story in which at least two people move more than once, and a question about it."""
    moves_of = list(random.choice(random.choice((MOVES_OF_TWO, MOVES_OF_THREE))))
    world = World()
    words: list[str] = []
    for step in story_steps(random, moves_of, n_objects=2):
        words += tell(step, world)
    kind = random.choices(list(QUESTION_SHARES), list(QUESTION_SHARES.values()))[0]
    asked, answer = question(random, world, kind)
    return Example((*words, *asked), answer, kind)


def question(random: Random, world: World, kind: str) -> tuple[list[str], str]:
    """A question of one kind about a world, and its answer."""
    if kind == "person":
        person = random.choice(list(world.places))
        return ["where", "is", person, "?"], world.places[person]
    thing = random.choice(list(world.holders))
    if kind == "object":
        return ["where", "is", "the", thing, "?"], world.places[world.holders[thing]]
    if kind == "colour":
        return ["what", "colour", "is", "the", thing, "?"], world.colours[thing]
    return ["who", "has", "the", thing, "?"], world.holders[thing]


def qa_splits(seed: int = 0, sizes: tuple[int, int, int] = SPLIT_SIZES) -> Task:
    """The question answering task: 10,000 / 1,000 / 2,000 rows; no text occurs twice."""
    random = Random(f"qa/{seed}")
    examples: dict[tuple[str, ...], Example] = {}
    while len(examples) < sum(sizes):
        example = qa_example(random)
        examples.setdefault(example.words, example)
    answers = (*PLACES, *NAMES, *COLOURS)
    return task_of("qa", tuple(QUESTION_SHARES), answers, list(examples.values()), sizes, world_vocabulary())

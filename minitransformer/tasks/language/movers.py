"""Where is who? The toy world's question in natural English.

    Nora moved to Oslo. Ben flew to Rome. Nora went on to Paris. Where is Nora? Answer with one word.     -> Paris

Two or three people each move once or twice; who moves when is mixed, so the last city of the text is often another's.
No story occurs twice, whatever is asked about it, and the stories are drawn one by one, so each split has every kind.
"""

from random import Random

from minitransformer.tasks.language.pairs import LanguageTask, Pair, ask, check_sizes, cut, same_text

PEOPLE = ("Nora", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Julia", "Oscar")
CITIES = ("Oslo", "Rome", "Paris", "London", "Berlin", "Madrid", "Vienna", "Lisbon")
FIRST = ("{} moved to {}.", "{} went to {}.", "{} flew to {}.", "{} travelled to {}.")
SECOND = ("{} went on to {}.", "Then {} moved to {}.", "{} moved on to {}.", "Later {} flew to {}.")
SIZES = (2_000, 200, 200)
MOST = 100_000  # far fewer than there are stories, so drawing again until one is new ends soon


def movers_splits(seed: int = 0, sizes: tuple[int, int, int] = SIZES) -> LanguageTask:
    """The task: conversations of one question; the answer is the name of a city.

    Args:
        seed: of the stories.
        sizes: how many of them train, validation and test have.

    Raises:
        ValueError: a split without stories, or more than 100,000 in all.
    """
    check_sizes(sizes, MOST)
    random = Random(f"movers/{seed}")
    stories: dict[str, Pair] = {}
    while len(stories) < sum(sizes):
        story, pair = _story(random)
        stories.setdefault(story, pair)
    return LanguageTask("movers", matches=same_text, **cut(list(stories.values()), sizes))


def _story(random: Random) -> tuple[str, Pair]:
    people = random.sample(PEOPLE, random.choice((2, 3)))
    cities = {person: random.sample(CITIES, random.choice((1, 2))) for person in people}
    turns = [person for person in people for _ in cities[person]]
    random.shuffle(turns)
    lines = []
    for i, person in enumerate(turns):
        move = turns[:i].count(person)
        lines.append(random.choice(SECOND if move else FIRST).format(person, cities[person][move]))
    story, who = " ".join(lines), random.choice(people)
    kind = f"{len(people)} people, {len(cities[who])} {'move' if len(cities[who]) == 1 else 'moves'}"
    return story, ask(f"{story} Where is {who}? Answer with one word.", cities[who][-1], kind)

"""Classification as text-to-text: a review, the prompt "so the sentiment is", one of two label words.

    although the play was not dull , the music was awful . so the sentiment is     -> negative

The prompt matters. Behind "is", the pretrained model knows that a label word may come ("the number two is positive"),
so a method only has to say which. With the prompt "sentiment :", behind which it has never seen one, LoRA on query and
value and prefixes stayed at chance for hundreds of steps on the same backbone.

Every review has two clauses or a correction ("not dull but charming"), and every clause is denied as often as
not: whoever counts good and bad words is right half of the time (`bag_of_words.py` measures it).
"""

from random import Random

from minitransformer.tasks.dataset import Example, Task, task_of
from minitransformer.tasks.toy.reviews import review
from minitransformer.tasks.toy.world import LABELS, world_vocabulary

KINDS = ("correction", "agreement", "contrast", "concession")
PROMPT = ("so", "the", "sentiment", "is")
SPLIT_SIZES = (10_000, 1_000, 2_000)  # train, validation, test


def sentiment_example(random: Random, label: str) -> Example:
    """A review with the wanted verdict."""
    kind = random.choice(KINDS)
    words = review(random, good=label == LABELS[0], kind=kind)
    return Example((*words, *PROMPT), label, kind)


def sentiment_splits(seed: int = 0, sizes: tuple[int, int, int] = SPLIT_SIZES) -> Task:
    """The sentiment task: 10,000 / 1,000 / 2,000 rows; labels alternate, and no text occurs twice.

    Each label's reviews are shuffled before the cut, so that every kind has its share of every split.
    """
    random = Random(f"sentiment/{seed}")
    examples: dict[tuple[str, ...], Example] = {}
    while len(examples) < sum(sizes):
        example = sentiment_example(random, LABELS[len(examples) % 2])
        examples.setdefault(example.words, example)
    listed = list(examples.values())
    for place in range(len(LABELS)):  # short reviews run out of new texts: what is drawn late holds fewer of them
        of_the_label = listed[place :: len(LABELS)]
        random.shuffle(of_the_label)
        listed[place :: len(LABELS)] = of_the_label
    return task_of("sentiment", KINDS, LABELS, listed, sizes, world_vocabulary())

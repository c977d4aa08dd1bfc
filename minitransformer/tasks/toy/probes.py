"""Probes: does the pretrained model have the circuits that the tasks need?

Each probe asks in the form of the pretraining text, never in the form of the tasks, and reads the next word:

    person    <story> the place of mary is ...       several people, each bound to their latest place
    object    <story> the place of the apple is ...  through the holder
    colour    <story> the colour of the apple is ...
    holder    <story> the holder of the apple is ...
    opinion   <two-clause review> so tom ...         smiled or sighed: PLEASED against DISPLEASED, as sums
"""

from random import Random

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minitransformer.tasks.dataset import Dataset, Example, split_of
from minitransformer.tasks.toy.qa import MOVES_OF_THREE, MOVES_OF_TWO
from minitransformer.tasks.toy.reviews import review
from minitransformer.tasks.toy.stories import story_steps, tell
from minitransformer.tasks.toy.world import COLOURS, DISPLEASED, NAMES, PLACES, PLEASED, World, world_vocabulary

STORY_PROBES = ("person", "object", "colour", "holder")
PROBES = (*STORY_PROBES, "opinion")


def story_probe(random: Random, kind: str) -> Example:
    """A story as hard as the task's, and the beginning of a recap."""
    moves_of = list(random.choice(random.choice((MOVES_OF_TWO, MOVES_OF_THREE))))
    world = World()
    words: list[str] = []
    for step in story_steps(random, moves_of, n_objects=2):
        words += tell(step, world)
    if kind == "person":
        person = random.choice(list(world.places))
        return Example((*words, "the", "place", "of", person, "is"), world.places[person], kind)
    thing = random.choice(list(world.holders))
    noun, answer = {
        "object": ("place", world.place_of_object(thing)),
        "colour": ("colour", world.colours[thing]),
        "holder": ("holder", world.holders[thing]),
    }[kind]
    return Example((*words, "the", noun, "of", "the", thing, "is"), answer, kind)


def opinion_probe(random: Random) -> Example:
    """A review of two clauses and the beginning of its outcome; the answer stands for its whole polarity."""
    good = random.random() < 0.5
    words = review(random, good, random.choice(("agreement", "contrast", "concession")))
    return Example((*words, "so", random.choice(NAMES)), (PLEASED if good else DISPLEASED)[0], "opinion")


def probe_rows(kind: str, n_rows: int, seed: int = 0) -> Dataset:
    """The rows of one probe.

    Raises:
        ValueError: there is no such probe.
    """
    if kind not in PROBES:
        raise ValueError(f"there is no probe {kind!r}; the probes are {', '.join(PROBES)}")
    random = Random(f"probe/{kind}/{seed}")
    make = opinion_probe if kind == "opinion" else lambda source: story_probe(source, kind)
    return split_of([make(random) for _ in range(n_rows)], world_vocabulary())


@torch.no_grad()
def probe_scores(model: nn.Module, n_rows: int = 250, seed: int = 0) -> dict[str, float]:
    """The share of right answers of every probe, on `n_rows` rows each."""
    was_training = model.training
    model.eval()
    scores = {kind: probe_score(model, kind, probe_rows(kind, n_rows, seed)) for kind in PROBES}
    model.train(was_training)
    return scores


def probe_score(model: nn.Module, kind: str, rows: Dataset) -> float:
    """The share of right answers on the rows of one probe, among the words that could answer it.

    The choice is restricted (to places, say) because a recap may also go on with "now" or "still".
    """
    hidden = model.hidden(rows.tokens, rows.padding_mask)
    last = rows.padding_mask.sum(dim=1) - 1
    logits = model.lm_head(hidden[torch.arange(len(rows)), last])
    if kind == "opinion":
        pleased, displeased = word_ids(PLEASED), word_ids(DISPLEASED)
        says_good = logits[:, pleased].logsumexp(dim=-1) > logits[:, displeased].logsumexp(dim=-1)
        return (says_good == (rows.targets == pleased[0])).float().mean().item()
    candidates = word_ids({"person": PLACES, "object": PLACES, "colour": COLOURS, "holder": NAMES}[kind])
    return (candidates[logits[:, candidates].argmax(dim=-1)] == rows.targets).float().mean().item()


def word_ids(words: tuple[str, ...]) -> Int[Tensor, " n"]:
    """The ids of several words."""
    return torch.tensor(world_vocabulary().encode(list(words)))

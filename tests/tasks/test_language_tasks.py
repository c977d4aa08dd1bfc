import json
import re
from itertools import combinations

import pytest
import torch
from reference.shares import worst

from minitransformer.tasks.language.movers import CITIES, PEOPLE, movers_splits
from minitransformer.tasks.language.pairs import Pair, ask, same_text
from minitransformer.tasks.language.records import FORENAMES, KEYS, SURNAMES, WORDINGS, records_splits, same_record
from minitransformer.tasks.language.rows import answer_rows, generated_answers, prompt_rows
from minitransformer.tasks.real.batches import batches_of_like_length

TASKS = {"movers": movers_splits, "records": records_splits}


class Letters:
    """A tokenizer of 23 tokens: letters, a blank, the end of a turn, which is the padding too."""

    end_id = pad_id = 0

    def encode(self, text):
        return ["| abcdefghijklmnopqrstu".index(letter) for letter in text]

    def encode_chat(self, messages, add_generation_prompt=False):
        said = "".join(message["content"] + "|" for message in messages)
        return self.encode(said + " " * add_generation_prompt)

    def decode(self, tokens):
        return "".join("| abcdefghijklmnopqrstu"[token] for token in tokens)


PAIRS = [Pair("ab", "c"), ask("abcde", "fg"), Pair("a", "bc", "kind"), Pair("abc", "")]


def text_of(pair):
    return pair.prompt[-1]["content"]


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return TASKS[request.param]()


def splits_of(task):
    return task.train, task.validation, task.test


def test_sizes_and_disjoint_prompts(task):
    assert [len(split) for split in splits_of(task)] == [2_000, 200, 200]
    texts = [{text_of(pair) for pair in split} for split in splits_of(task)]
    assert [len(own) for own in texts] == [2_000, 200, 200]
    assert not any(a & b for a, b in combinations(texts, 2))


def test_no_story_is_asked_about_in_two_splits():
    stories = [{text_of(pair).split(" Where is")[0] for pair in split} for split in splits_of(movers_splits())]
    assert [len(own) for own in stories] == [2_000, 200, 200]
    assert not any(a & b for a, b in combinations(stories, 2))


def test_nobody_is_in_the_records_of_two_splits():
    everybody = {f"{first} {last}" for first in FORENAMES for last in SURNAMES}
    names = []
    for split in splits_of(records_splits()):
        said = {words for pair in split for words in re.findall(r"(?=\b(\w+ \w+))", text_of(pair))}
        names.append(said & everybody)
        known = {record["name"] for pair in split if "name" in (record := json.loads(pair.answer))}
        assert known <= names[-1]
    assert not any(a & b for a, b in combinations(names, 2))


def test_every_kind_has_its_share_of_every_split(task):
    pairs = [pair for split in splits_of(task) for pair in split]
    parts = [part for part, split in enumerate(splits_of(task)) for _ in split]
    assert worst([pair.kind for pair in pairs], parts) < 4


def test_the_seed_decides(task):
    make = TASKS[task.name]
    assert make(0, (20, 5, 5)).train == make(0, (20, 5, 5)).train
    assert make(0, (20, 5, 5)).train != make(1, (20, 5, 5)).train
    assert [len(split) for split in splits_of(make(3, (20, 5, 6)))] == [20, 5, 6]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (99_999, 1, 1), (1.0, 1, 1)])
def test_impossible_sizes_are_refused(task, unchecked, sizes):
    with pytest.raises(ValueError, match="rows of train, validation and test"):
        TASKS[task.name](0, sizes)


def test_the_answer_of_a_story_is_where_its_moves_lead():
    """An oracle of its own: the last city that is named in a sentence about the one who is asked for."""
    for pair in movers_splits().train:
        *moves, question, _ = re.findall(r"[^.?]+[.?]", text_of(pair))
        asked = re.fullmatch(r" Where is (\w+)\?", question).group(1)
        where = {}
        for move in moves:
            (person,) = set(re.findall(r"\w+", move)) & set(PEOPLE)
            (city,) = set(re.findall(r"\w+", move)) & set(CITIES)
            assert where.get(person) != city  # whoever moves, moves elsewhere
            where[person] = city
        assert pair.answer == where[asked]
        assert 2 <= len(where) <= 3 and len(moves) <= 2 * len(where)


def test_the_last_city_of_a_story_is_not_the_answer():
    """Not more often than chance has it: somebody's move must be last."""
    last = [re.findall(r"(\w+)\. Where", text_of(pair))[0] == pair.answer for pair in movers_splits().train]
    assert 0.4 < sum(last) / len(last) < 0.55


def test_every_value_of_a_record_stands_in_its_sentence():
    task = records_splits()
    for pair in (*task.train, *task.test):
        sentence, request = text_of(pair).split("\n")
        record = json.loads(pair.answer)
        assert request == f"Write this as JSON with the keys {', '.join(record)}."
        assert 2 <= len(record) <= 4 and set(record) <= set(KEYS[pair.kind])
        fillings = [re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(wording)) for wording in WORDINGS[pair.kind]]
        (match,) = filter(None, (re.fullmatch(filling, sentence) for filling in fillings))
        assert {key: match[key] for key in record} == {key: str(value) for key, value in record.items()}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ('{"name": "Ada", "age": 34}', True),
        (' {"age":34,\n"name":"Ada"}\n', True),
        ('{"name": "Ada", "age": 34.0}', False),
        ('{"name": "Ada", "age": "34"}', False),
        ('{"name": "Ada", "age": 35}', False),
        ('{"name": "Ada"}', False),
        ('{"name": "Ada", "age": 34, "city": "Oslo"}', False),
        ('{"name": "Ada", "age": 35, "age": 34}', False),
        ('Here it is: {"name": "Ada", "age": 34}', False),
        ('{"name": "Ada", "age": 34}.', False),
        ("", False),
        ("[" * 100_000, False),
        ('["name", "age"]', False),
    ],
)
def test_what_counts_as_the_record(said, right):
    assert same_record(said, '{"name": "Ada", "age": 34}') is right


def test_what_counts_as_the_text():
    assert same_text(" Oslo\n", "Oslo")
    assert not any(same_text(said, "Oslo") for said in ("Oslo.", "oslo", "Nora is in Oslo", ""))


def test_accuracy_is_the_share_of_right_answers():
    task = movers_splits(0, (4, 1, 1))
    said = [pair.answer for pair in task.train]
    assert task.accuracy(said, task.train) == 1.0
    assert task.accuracy([said[0], "", " " + said[2], "?"], task.train) == 0.5
    with pytest.raises(ValueError, match="3 texts for 4 prompts"):
        task.accuracy(said[:3], task.train)


def test_the_answer_and_the_end_of_its_turn_are_asked_for_and_nothing_else():
    rows = answer_rows(Letters(), PAIRS)
    assert rows.tokens.tolist() == [
        [2, 3, 4, 0, 0, 0, 0, 0, 0, 0],
        [2, 3, 4, 5, 6, 0, 1, 7, 8, 0],  # a conversation; its prompt has an end of turn too
        [2, 3, 4, 0, 0, 0, 0, 0, 0, 0],
        [2, 3, 4, 0, 0, 0, 0, 0, 0, 0],  # an empty answer: stop at once
    ]
    assert rows.padding_mask.sum(dim=1).tolist() == [4, 10, 4, 4]
    nothing = -100
    assert rows.targets.tolist() == [
        [nothing, 4, 0] + [nothing] * 7,  # each at the place of the token before it
        [nothing] * 6 + [7, 8, 0, nothing],
        [3, 4, 0] + [nothing] * 7,
        [nothing, nothing, 0] + [nothing] * 7,
    ]


def test_rows_and_columns_are_cut_together():
    rows = answer_rows(Letters(), PAIRS)
    short = rows.rows(torch.tensor([2, 0])).trimmed()
    assert short.tokens.shape == (2, 4)
    assert torch.equal(short.targets, rows.targets[[2, 0], :4])
    assert len(rows.rows(slice(1, 3))) == 2


def test_batches_are_of_like_length():
    pairs = [Pair("a" * n, "b") for n in (1, 2, 3, 4, 11, 12, 13, 14) for _ in range(4)]
    rows = answer_rows(Letters(), pairs)
    batch_at = batches_of_like_length(rows, batch_size=4)
    seen = [batch_at(step) for step in range(8)]
    assert sum(batch.tokens.shape[1] for batch in seen) == sum((1, 2, 3, 4, 11, 12, 13, 14)) + 8 * 2
    assert sum(int((batch.targets != -100).sum()) for batch in seen) == 2 * len(pairs)


def test_prompts_are_padded_on_the_left():
    tokens, padding_mask = prompt_rows(Letters(), PAIRS[:3])
    assert tokens.tolist() == [[0] * 5 + [2, 3], [2, 3, 4, 5, 6, 0, 1], [0] * 6 + [2]]
    assert padding_mask.tolist() == [[False] * 5 + [True] * 2, [True] * 7, [False] * 6 + [True]]


@pytest.mark.parametrize("make", [answer_rows, prompt_rows])
def test_a_prompt_without_a_token_is_refused(make):
    with pytest.raises(ValueError, match="an empty prompt"):
        make(Letters(), [Pair("", "a")])
    with pytest.raises(ValueError, match="no rows"):
        make(Letters(), [])


def test_answers_are_those_of_each_row_alone_up_to_its_end(decoder):
    """In batches of unequal prompts, in another order, and cut where the turn ends."""
    model, tokenizer = decoder(seed=3, max_len=40), Letters()
    pairs = [Pair("abcdefghij"[:n], "") for n in (7, 2, 10, 1, 5)]
    said = generated_answers(model, tokenizer, pairs, max_new_tokens=12, batch_size=2)
    for pair, own in zip(pairs, said, strict=True):
        tokens = torch.tensor([tokenizer.encode(pair.prompt)])
        alone = tokenizer.decode(model.generate(tokens, 12)[0, tokens.shape[1] :].tolist())
        assert own == alone.split("|")[0]


def test_an_answer_ends_where_its_turn_ends():
    class Parrot(torch.nn.Linear):
        def generate(self, tokens, max_new_tokens, padding_mask, **options):
            return torch.cat([tokens, torch.tensor([[5, 6, 0, 7, 0]] * len(tokens))], dim=1)

    assert generated_answers(Parrot(1, 1), Letters(), PAIRS[:2], max_new_tokens=5) == ["de", "de"]

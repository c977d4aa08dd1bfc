"""Checkers of notebook 13."""

import math
from random import Random

import torch

from exercises.verdict import called, checker, given, require, same


@checker
def check_choice_scores(choice_scores) -> str:
    """choice_scores(question [B, d], answers [B, C, d], scale) -> scale * cosine [B, C]."""
    generator = torch.Generator().manual_seed(0)
    question, answers = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 5), (3, 4, 5)))
    product = (question[:, None] * answers).sum(-1)
    lengths = question.norm(dim=-1)[:, None] * answers.norm(dim=-1)
    hints = {
        "those are products of vectors of any length: a long answer would win; divide by both lengths": 20 * product,
        "the scale is missing": product / lengths,
        "divided by the answers' lengths only": 20 * product / answers.norm(dim=-1),
        "divided by the question's length only": 20 * product / question.norm(dim=-1)[:, None],
        "the softmax comes later: scores are logits": (20 * product / lengths).softmax(-1),
    }
    same(called(choice_scores, question, answers, 20.0), 20 * product / lengths, hints, "the scores")
    return "cosines between -1 and 1; the scale makes them logits that a softmax can tell apart."


@checker
def check_in_batch_loss(in_batch_loss) -> str:
    """in_batch_loss(questions [B, d], answers [B, d], scale) -> cross-entropy of each question's own answer."""
    generator = torch.Generator().manual_seed(0)
    questions, answers = (
        torch.nn.functional.normalize(torch.randn(4, 6, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    scores = 5.0 * questions @ answers.T
    each = scores.logsumexp(dim=1) - scores.diagonal()
    hints = {
        "the scale is missing": ((scores / 5).logsumexp(dim=1) - scores.diagonal() / 5).mean(),
        "that is the sum over the questions, not their mean": each.sum(),
        "each question chooses among the answers, the rows of the table; yours lets answers choose questions":
            (scores.logsumexp(dim=0) - scores.diagonal()).mean(),
        "that is the mean score of the right answers; what about the others?": -scores.diagonal().mean(),
        "the right answer of question i is answer i, not answer 0": (scores.logsumexp(dim=1) - scores[:, 0]).mean(),
    }  # fmt: skip
    same(called(in_batch_loss, questions, answers, 5.0), each.mean(), hints, "the loss")
    return f"B - 1 wrong answers for each question, none of them drawn; to know nothing costs log B = {math.log(4):.2f}"


@checker
def check_drawn(drawn) -> str:
    """drawn(answer, pool, random) -> three wrong answers, each once, none that is the right one in other capitals."""
    pool = ["Cod", "cod", "Eel", "Ray", "Tuna", "tuna", "Bass", "eel"]
    found = set()
    for seed in range(60):
        result = list(given(called(drawn, "COD", pool, Random(seed))))
        require(len(result) == 3, f"three wrong answers are wanted, yours are {len(result)}")
        require(all(own in pool for own in result), f"{result} holds something that is not in the pool")
        low = [own.lower() for own in result]
        require("cod" not in low, f"{result} holds COD, the right one, in other capitals: two choices would be right")
        require(len(set(low)) == 3, f"{result} holds one answer twice, but for its capitals")
        found.add(tuple(sorted(low)))
    require(len(found) > 1, "the same three come every time: use `random`")
    require(len(found) == 4, "some wrong answers never come: draw from all of them")
    return "wrong, of the same kind, and each once."

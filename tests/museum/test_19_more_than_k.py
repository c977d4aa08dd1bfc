"""Top-k sampling that keeps everything as good as the k-th.

`logits < topk(logits, k).values[-1]` hides what is *worse* than the k-th best. Where several words are equally good it
keeps them all: with equal logits `top_k=1` draws from the whole vocabulary. In 16-bit arithmetic ties are common.

Found in: vllm-project/vllm, pull request 50979 (https://github.com/vllm-project/vllm/pull/50979)

The lesson: take the k best by their places, not by a threshold.
"""

import torch
from exhibit import caught

from minitransformer.generation import next_word


def by_threshold(logits, top_k, generator):
    """The wrong way."""
    worst_kept = logits.topk(top_k).values[:, -1:]
    kept = logits.masked_fill(logits < worst_kept, float("-inf"))
    return torch.multinomial(kept.softmax(dim=-1), 1, generator=generator).squeeze(1)


def ours(logits, top_k, generator):
    return next_word(logits, 1.0, top_k, generator)


def check_at_most_k_words_are_drawn(draw):
    generator = torch.Generator().manual_seed(0)
    for k in (1, 3):
        drawn = {draw(torch.zeros(1, 10), k, generator).item() for _ in range(200)}
        assert len(drawn) <= k, f"top_k={k} drew {len(drawn)} different words"


def test_equal_logits():
    caught(check_at_most_k_words_are_drawn, by_threshold)
    check_at_most_k_words_are_drawn(ours)

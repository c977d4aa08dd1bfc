"""Generation: ask for the next word, append it, ask again.

Sources: Radford et al. 2019 (greedy and top-k sampling from a language model); Holtzman et al. 2020, "The Curious Case
of Neural Text Degeneration", section 3.1 (nucleus sampling, top-p). With a KV cache each step reads one new token per
row; without, the whole text. Both give the same words.

Shapes: tokens [B, T] -> [B, T + n], n = max_new_tokens, or fewer if every row has ended before.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.cache import KVCache
from minitransformer.call import CALL, as_told, of_rows
from minitransformer.config import check_whole
from minitransformer.embedding import Real, Tokens, check_text
from minitransformer.fast.generation import FastSteps, fast_steps
from minitransformer.modes import evaluation_mode


def next_word(
    logits: Float[Tensor, "B V"],
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
    top_p: float | None = None,
    among: tuple[Int[Tensor, "B"], int] | None = None,
) -> Int[Tensor, "B"]:
    """The best word (temperature 0), or one drawn from `probabilities`.

    `among`: which rows of how many these are. The others draw too, so no row's words depend on when another has ended.
    """
    if temperature == 0.0:
        return logits.max(dim=-1).indices  # as argmax, in less time
    p = probabilities(logits, temperature, top_k, top_p)
    if among is None:
        return torch.multinomial(p, 1, generator=generator).squeeze(1)
    rows, n_rows = among
    p = p.new_ones(n_rows, p.shape[1]).index_copy(0, rows, p)
    return torch.multinomial(p, 1, generator=generator)[rows, 0]


def probabilities(
    logits: Float[Tensor, "B V"], temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "B V"]:
    """softmax(logits / temperature), then the `top_k` best words alone, then of these the nucleus alone.

    The nucleus is the smallest set of best words whose probability is at least `top_p` in sum: Holtzman et al. 2020,
    equation 2. Of equally good words the first ones are taken. What is kept is divided by its sum (equation 3).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16 bits cannot sum up to a top_p
    from_best = logits - logits.amax(dim=-1, keepdim=True)  # or dividing by a low temperature might overflow
    p = (from_best / max(temperature, 1e-30)).softmax(dim=-1)
    if top_k is None and top_p is None:
        return p
    words = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    best = p.gather(1, words)
    if top_p is not None:
        better = F.pad((best / best.sum(dim=-1, keepdim=True)).cumsum(dim=-1)[:, :-1], (1, 0))
        best = best.masked_fill(better >= top_p, 0.0)
    return torch.zeros_like(p).scatter(1, words, best / best.sum(dim=-1, keepdim=True))


def generate(
    model: nn.Module, tokens: Tokens, max_new_tokens: int, padding_mask: Real = None, **options
) -> Int[Tensor, "B more"]:
    """Continue each row by `max_new_tokens` words, or up to its stop token: `stream`, run to its end.

    Shapes, options and errors as there; no more columns come out than the longest row needs.
    """
    new = [column[:, None] for column in stream(model, tokens, max_new_tokens, padding_mask, **options)]
    return torch.cat([tokens, *new], dim=1)


def stream(
    model: nn.Module,
    tokens: Tokens,
    max_new_tokens: int,
    padding_mask: Real = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
    top_p: float | None = None,
    stop: int | Iterable[int] | Tensor | None = None,
    pad_id: int | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """The words that `generate` appends, one column [B] at a time, each computed when it is asked for.

    From the first column to the last, or until it is closed, the model is in evaluation mode, and should be left as it
    is. The methods that are off, and the tasks of the rows, are those at the time of this call.

    Args:
        model: a causal Transformer.
        tokens, max_new_tokens: the beginnings, [B, T], and how many words to add at most.
        padding_mask: True = a real token; shorter rows are padded on the left.
        temperature: 0 is greedy; higher values draw more freely.
        top_k: draw among the k best words only.
        seed: of the draws.
        use_cache: keep keys and values instead of computing them again.
        top_p: draw among the fewest best words that have this probability in sum.
        stop: a word that ends a row, or several. It stays, as the row's last word; the row is not computed any more,
            and the loop ends with the last row.
        pad_id: what fills an ended row; 0 if it is left out, which is `<pad>` in `Vocabulary`.

    Raises:
        ValueError: an encoder, tokens that are no batch of texts, a text that would outgrow max_len, right padding, or
            an option that is bad or would be ignored.
    """
    _check(model, tokens, max_new_tokens, padding_mask)
    _check_options(temperature, top_k, top_p, seed)
    stop = _stop_words(stop, pad_id, model.config.vocab_size)
    real = None if padding_mask is None or bool(padding_mask.all()) else padding_mask  # no padding, no mask
    texts = Texts(model, tokens, real, KVCache(len(model.blocks)) if use_cache else None, CALL.told)
    generator = torch.Generator(device=tokens.device).manual_seed(seed) if temperature else None
    choose = partial(next_word, temperature=temperature, top_k=top_k, generator=generator, top_p=top_p)
    return _columns(texts, max_new_tokens, stop, pad_id or 0, choose)


@dataclass
class Texts:
    """The rows that go on, and what the model keeps of them."""

    model: nn.Module
    tokens: Int[Tensor, "B T"]
    real: Bool[Tensor, "B T"] | None
    cache: KVCache | None
    told: Mapping  # which methods are off, which row is under which task
    fast: FastSteps | None = None  # the plain form reads the beginning

    def scores(self, left: int) -> Float[Tensor, "B V"]:
        """The scores of each row's next word, after which `left` will come."""
        return self.read(left) if self.fast is None else self.fast(self.tokens[:, -1:])

    @torch.no_grad()
    def read(self, left: int) -> Float[Tensor, "B V"]:
        """`scores` in the plain form: behind a cache only what is new is read."""
        begins = self.cache is None or self.cache.is_empty
        unread = self.tokens if begins else self.tokens[:, -1:]
        real = None if self.real is None else self.real[:, -unread.shape[1] :]
        hidden = self.model.hidden(unread, real, cache=self.cache)
        if begins and self.cache is not None:
            self.fast = fast_steps(self.model, self.cache, left)
        return self.model.lm_head(hidden[:, -1])

    def append(self, word: Int[Tensor, "B"]) -> None:
        """Each row's newest word."""
        self.tokens = torch.cat([self.tokens, word[:, None]], dim=1)
        self.real = None if self.real is None else F.pad(self.real, (0, 1), value=True)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Go on with these rows alone."""
        self.tokens, self.real = self.tokens[rows], None if self.real is None else self.real[rows]
        self.told = of_rows(self.told, rows)
        for part in (self.cache, self.fast):
            if part is not None:
                part.keep(rows)


def _columns(
    texts: Texts, max_new_tokens: int, stop: list[int], pad_id: int, choose: Callable
) -> Iterator[Int[Tensor, " B"]]:
    n_rows, device = len(texts.tokens), texts.tokens.device
    ends, among = torch.tensor(stop, device=device), None  # None: all rows go on
    with evaluation_mode(texts.model):
        for left in range(max_new_tokens, 0, -1):
            word = choose(as_told(texts.told, texts.scores, left - 1), among=among)
            column = word if among is None else word.new_full((n_rows,), pad_id).index_copy(0, among[0], word)
            texts.append(word)
            if stop and bool((ended := torch.isin(word, ends)).any()):
                on = (~ended).nonzero().flatten()
                among = on if among is None else among[0][on], n_rows
                texts.keep(on)
            yield column
            if not texts.tokens.numel():
                return


def _check(model: nn.Module, tokens: Tensor, max_new_tokens: int, padding_mask: Tensor | None) -> None:
    check_text(tokens, padding_mask)
    if not model.config.causal:
        raise ValueError("an encoder (causal=False) cannot generate: it reads in both directions; use a decoder")
    check_whole("max_new_tokens", max_new_tokens, 0)
    room, length = model.embedding.room, tokens.shape[1]
    if length + max_new_tokens > room:
        taken = "" if room == model.config.max_len else f", of which a prompt leaves {room}"
        cure = f"ask for at most {max(0, room - length)} new tokens, or shorten the beginning"
        there = f"{length} tokens and {max_new_tokens} new ones exceed max_len {model.config.max_len}"
        raise ValueError(f"{there}{taken}; {cure}")
    if padding_mask is not None and not bool(padding_mask[:, -1].all()):
        raise ValueError("generation goes on from the last column, so pad on the left (the mask ends in False)")


def _check_options(temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, and finite, got {temperature}")
    check_whole("seed", seed, 0)
    if top_k is not None:
        check_whole("top_k", top_k, 1)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is a probability above 0, and at most 1, got {top_p}")
    if temperature == 0.0 and (top_k is not None or top_p is not None or seed != 0):
        given = f"top_k={top_k} and seed={seed}" if top_p is None else f"top_p={top_p}"
        raise ValueError(f"{given} would be ignored: give a temperature above 0 to draw words")


def _stop_words(stop: int | Iterable[int] | Tensor | None, pad_id: int | None, n_words: int) -> list[int]:
    """The stop tokens as a list; ValueError for one that no row can reach, or a pad_id that no row needs."""
    if stop is None:
        if pad_id is not None:
            raise ValueError(f"pad_id={pad_id} would be ignored: no row ends without stop, the word that ends it")
        return []
    stop = stop.tolist() if isinstance(stop, Tensor) else stop
    words = list(stop) if isinstance(stop, Iterable) else [stop]
    for name, word in [("stop", word) for word in words] + [("pad_id", pad_id or 0)]:
        check_whole(name, word, 0, below=n_words)
    if not words:
        raise ValueError("stop names no word, so it would be ignored; leave it out")
    return words

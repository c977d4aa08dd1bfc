"""Generation: ask for the next word, append it, ask again.

Source: Radford et al. 2019 (greedy and top-k sampling from a language model). With a KV cache each step reads one new
token per row; without, the whole text. Both give the same words.

Shapes: tokens [B, T] -> [B, T + max_new_tokens].
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.cache import KVCache
from minitransformer.embedding import Real, Tokens, check_text
from minitransformer.fast.generation import fast_steps
from minitransformer.modes import evaluation_mode


def next_word(
    logits: Float[Tensor, "B V"], temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Int[Tensor, "B"]:
    """The best word (temperature 0), or one drawn from softmax(logits / temperature) over the `top_k` best.

    Of equally good words the first ones are taken.
    """
    if temperature == 0.0:
        return logits.max(dim=-1).indices  # as argmax, in less time
    if top_k is not None:
        left_out = logits.sort(dim=-1, descending=True, stable=True).indices[:, top_k:]
        logits = logits.scatter(1, left_out, -math.inf)
    from_best = logits - logits.amax(dim=-1, keepdim=True)  # or dividing by a low temperature might overflow
    p = (from_best / max(temperature, 1e-30)).softmax(dim=-1)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tokens,
    max_new_tokens: int,
    padding_mask: Real = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Int[Tensor, "B more"]:
    """Continue each row by `max_new_tokens` words.

    Args:
        model: a causal Transformer.
        tokens, max_new_tokens: the beginnings, [B, T], and how many words to add.
        padding_mask: True = a real token; shorter rows are padded on the left.
        temperature: 0 is greedy; higher values draw more freely.
        top_k: draw among the k best words only.
        seed: of the draws.
        use_cache: keep keys and values instead of computing them again.

    Raises:
        ValueError: an encoder, tokens that are no batch of texts, a text that would outgrow max_len, right padding, or
            an option that is bad or would be ignored.
    """
    _check(model, tokens, max_new_tokens, padding_mask, temperature, top_k, seed)
    generator = torch.Generator(device=tokens.device).manual_seed(seed) if temperature else None
    real = None if padding_mask is None or bool(padding_mask.all()) else padding_mask  # no padding, no mask
    cache = KVCache(model.config.n_layers) if use_cache else None
    fast = None  # the plain form reads the beginning
    with evaluation_mode(model):
        for left in range(max_new_tokens, 0, -1):
            if fast is None:
                unread = tokens if cache is None or cache.is_empty else tokens[:, -1:]
                hidden = model.hidden(unread, None if real is None else real[:, -unread.shape[1] :], cache=cache)
                logits = model.lm_head(hidden[:, -1])
            else:
                logits = fast(tokens[:, -1:])
            if cache is not None and left == max_new_tokens:
                fast = fast_steps(model, cache, left - 1)
            word = next_word(logits, temperature, top_k, generator)[:, None]
            tokens = torch.cat([tokens, word], dim=1)
            real = None if real is None else F.pad(real, (0, 1), value=True)
    return tokens


def _check(
    model: nn.Module, tokens: Tensor, max_new_tokens: int, padding_mask: Tensor | None, temperature, top_k, seed
) -> None:
    check_text(tokens, padding_mask)
    if not model.config.causal:
        raise ValueError("an encoder (causal=False) cannot generate: it reads in both directions; use a decoder")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    room, length = model.embedding.room, tokens.shape[1]
    if length + max_new_tokens > room:
        taken = "" if room == model.config.max_len else f", of which a prompt leaves {room}"
        cure = f"ask for at most {max(0, room - length)} new tokens, or shorten the beginning"
        there = f"{length} tokens and {max_new_tokens} new ones exceed max_len {model.config.max_len}"
        raise ValueError(f"{there}{taken}; {cure}")
    if padding_mask is not None and not bool(padding_mask[:, -1].all()):
        raise ValueError("generation goes on from the last column, so pad on the left (the mask ends in False)")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if temperature == 0.0 and (top_k is not None or seed != 0):
        raise ValueError(f"top_k={top_k} and seed={seed} would be ignored: give a temperature above 0 to draw words")

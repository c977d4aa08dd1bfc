"""Embeddings: from word numbers to vectors, with a vector for each position added.

Source: Vaswani et al. 2017, sections 3.4 and 3.5; learned positions as in GPT (Radford et al. 2018) and BERT
(Devlin et al. 2019, figure 2: token + segment + position, then a norm).

    x_t = E[token_t] + P[position_t] (+ S[segment_t])          [B, T, d_model]

A position counts the real tokens in front of a token, so padding on either side changes nothing. Where positions are
rotary (`position.py`), there is no P.

Differs from the paper: positions are learned, and the embeddings are not multiplied by sqrt(d_model).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.attention import is_transformed
from minitransformer.cache import KVCache
from minitransformer.config import TransformerConfig
from minitransformer.norm import norm_of

Tokens = Int[Tensor, "B T"]
Real = Bool[Tensor, "B T"] | None  # False at padding; None: there is none


class Embedding(nn.Module):
    """Tables `token` [V, d_model], `position` [max_len, d_model] and, for BERT, `segment` [n_segments, d_model]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_len, config.d_model) if config.position == "learned" else None
        if self.position is None:
            self.max_len = config.max_len
        self.segment = nn.Embedding(config.n_segments, config.d_model) if config.n_segments else None
        self.norm = norm_of(config) if config.embedding_norm else None
        self.dropout = config.dropout

    def forward(
        self, tokens: Tokens, real: Real = None, segments: Tokens | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T d_model"]:
        """Look the tokens up and add what each position (and segment; 0 if left out) means.

        `real` is False at padding (None: there is none); behind a `cache` positions go on counting from there.

        Raises:
            ValueError: a number that one of the tables does not have, or segments without a table.
        """
        place = positions(tokens, real, cache)
        check(self, tokens, place, segments)
        return self.summed(self.token(tokens), place, segments)

    @property
    def room(self) -> int:
        """How many tokens a text may have."""
        return self.max_len if self.position is None else self.position.num_embeddings

    def summed(
        self, vectors: Float[Tensor, "B T d_model"], positions: Int[Tensor, "#B T"], segments: Tokens | None = None
    ) -> Float[Tensor, "B T d_model"]:
        """Word vectors, wherever they come from, with positions and segments added, normalised, dropped out."""
        x = vectors if self.position is None else vectors + self.position(positions)
        if self.segment is not None:
            x = x + self.segment(positions.new_zeros(1, 1) if segments is None else segments)
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.dropout, self.training)


def positions(tokens: Tokens, real: Real = None, cache: KVCache | None = None) -> Int[Tensor, "#B T"]:
    """How many real tokens stand in front of each token of the row, those in the cache included.

    Where all are real (`real` is None), every row counts alike, and one row [1, T] stands for all.
    """
    before = 0 if cache is None else cache.n_tokens
    before = before[:, None] if isinstance(before, Tensor) else before
    if real is None:
        return before + torch.arange(tokens.shape[1], device=tokens.device)[None]
    return (before + real.long().cumsum(dim=1) - 1).clamp(min=0)


def values_are_read(tensor: Tensor) -> bool:
    """Whether a check may look at the values: there are some, and nobody traces or transforms what is computed."""
    return tensor.numel() > 0 and not (tensor.is_meta or torch.compiler.is_compiling() or is_transformed())


def check_text(tokens: Tensor, padding_mask: Tensor | None) -> None:
    """Raise ValueError, with the cure, for what is no batch of texts."""
    if tokens.numel() == 0:
        raise ValueError(f"tokens is empty, shape {tuple(tokens.shape)}; give at least one row of one token")
    if tokens.dim() != 2:
        shape = tuple(tokens.shape)
        raise ValueError(f"tokens must be [B, T], got shape {shape}; tokens[None] makes a batch of one row")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens are word numbers, torch.int64 or torch.int32, got {tokens.dtype}; use tokens.long()")
    if padding_mask is not None and (padding_mask.shape != tokens.shape or padding_mask.dtype != torch.bool):
        got = f"{padding_mask.dtype} {tuple(padding_mask.shape)}; mask.bool() turns a mask of 0 and 1 into one"
        raise ValueError(f"padding_mask must be bool and of the shape of tokens, {tuple(tokens.shape)}, got {got}")


def check(embedding: Embedding, tokens: Tensor, positions: Tensor, segments: Tensor | None = None) -> None:
    """Raise ValueError, with the cure, for numbers that one of the tables does not have."""
    if segments is not None and embedding.segment is None:
        raise ValueError("segments are given to a model with no segment table (config.n_segments is 0); leave them out")
    if segments is not None and segments.shape != tokens.shape:
        raise ValueError(f"segments must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(segments.shape)}")
    if not values_are_read(tokens):
        return
    cure = "encode the text with the vocabulary the model was trained with"
    _check_range("tokens", tokens, embedding.token, f"the vocabulary has {{}} words (0 to {{}}); {cure}")
    if segments is not None:
        _check_range("segments", segments, embedding.segment, "the model has {} (0 to {}); number the segments from 0")
    if (n := int(positions.max()) + 1) > embedding.room:
        cure = "shorten the text (or the prompt in front of it), or build the model with a larger max_len"
        raise ValueError(f"the sequence has {n} positions, but max_len is {embedding.room}; {cure}")


def _check_range(name: str, values: Tensor, table: nn.Embedding, there_are: str) -> None:
    low, high, n = int(values.min()), int(values.max()), table.num_embeddings
    if low < 0 or high >= n:
        raise ValueError(f"{name} range from {low} to {high}, but {there_are.format(n, n - 1)}")

"""The Transformer: embedding, a stack of blocks, a last norm, and scores for every word.

Sources: Radford et al. 2019 (GPT-2: `causal=True, norm="pre"`); Devlin et al. 2019 (BERT: `causal=False, norm="post"`).

    h = norm(block_L(… block_1(embedding(tokens))))        [B, T, d_model]   (no last norm where norms come "post")
    logits = lm_head(h)                                    [B, T, V]
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.attention import attention_mask, recorded
from minitransformer.block import Block
from minitransformer.cache import KVCache
from minitransformer.call import checkpointed
from minitransformer.config import TransformerConfig
from minitransformer.embedding import Embedding, values_are_read
from minitransformer.fast.last_position import at_position
from minitransformer.fast.loss import fast_cross_entropy, pays
from minitransformer.fast.stand_in import may_stand_in
from minitransformer.generation import generate
from minitransformer.heads import LMHead, MaskedLMHead
from minitransformer.initialization import initialize
from minitransformer.modes import evaluation_mode
from minitransformer.randomness import random_state_restored


class Transformer(nn.Module):
    """A decoder (GPT) or an encoder (BERT), as its config says.

    Args:
        config: shape and arithmetic.
        seed: of the fresh weights; the same seed gives the same weights.
    """

    def __init__(self, config: TransformerConfig, seed: int = 0):
        super().__init__()
        self.config = config
        # PyTorch's layers draw weights of their own when they are made; ours replace them, so the caller's random
        # state must not notice.
        with random_state_restored(torch.get_default_device()):
            self.embedding = Embedding(config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
            self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps) if config.norm == "pre" else nn.Identity()
            heads = {"tied": LMHead, "bert": MaskedLMHead, "none": lambda _: None}
            self.head = heads[config.lm_head](config)
        initialize(self, config.init, config.n_layers, seed)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        padding_mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Scores for every word at every position (for a decoder: of the word that comes next).

        Args and errors as in `hidden`.
        """
        return self.lm_head(self.hidden(tokens, padding_mask, segments, cache))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        padding_mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        cache: KVCache | None = None,
        asked: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B Q d_model"]:
        """The hidden states after the last norm.

        Args:
            tokens: word numbers, [B, T].
            padding_mask: True = a real token. Padding may stand on either side; it changes no real token's output.
            segments: BERT's token types.
            cache: a `KVCache`, which is read and extended (decoders only).
            asked: one position for each row, if no other is needed: the last block computes only these, which saves
                most of its work, and [B, 1, d_model] comes out.

        Raises:
            ValueError: a row without a real token, a sequence longer than max_len, a token outside the vocabulary,
                a padding_mask that does not fit the tokens, a cache for an encoder.
        """
        check(self, tokens, padding_mask, cache)
        x = self.embedding(tokens, padding_mask, segments, cache)  # [B, n + T, d_model]
        n = x.shape[1] - tokens.shape[1]  # vectors that an embedding may put in front of the words: always real
        real_keys, n_keys = padding_mask, x.shape[1]  # None: all are real
        if real_keys is not None and n:
            real_keys = F.pad(real_keys, (n, 0), value=True)
        if cache is not None:
            cache.count(tokens.shape[1], padding_mask)
            real_keys = cache.extend(n_keys, real_keys)
            n_keys = cache.n_keys
        mask = attention_mask(x.shape[1], real_keys, n_keys, self.config.causal, x.device)
        steps: list[Callable] = list(self.blocks)
        if asked is not None:
            steps[-1] = partial(at_position, self.blocks[-1], asked=asked + n)
        # Recomputed, a block would extend the cache twice.
        recompute = self.config.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for i, step in enumerate(steps):
            context = None if cache is None else cache.layers[i]
            x = checkpointed(step, x, mask, context) if recompute else step(x, mask, context)
        return self.norm(x[:, n:] if asked is None else x)

    def lm_head(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows V"]:
        """Scores for every word from hidden states: all of them, or only those that are needed.

        Raises:
            ValueError: the model was built with `lm_head="none"`.
        """
        if self.head is None:
            raise ValueError('this model has no language-model head (config.lm_head is "none"); use model.hidden(...)')
        return self.head(hidden, self.embedding.token.weight)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        padding_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy, in nats, of the word that `targets` wants at each position; -100 wants none.

        The same as with the logits of `forward`, which are never there all at once. Errors as in `hidden`.
        """
        wanted = targets != -100
        return self.word_loss(self.hidden(tokens, padding_mask)[wanted], targets[wanted])[0]

    def word_loss(
        self, hidden: Float[Tensor, "N d_model"], targets: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Mean cross-entropy of the words `targets` from the hidden states that should say them, and how many score
        highest; in the fast form where it may stand in, and pays."""
        known = self.is_plain and type(self.head) is LMHead and pays(hidden, self.embedding.token.weight)
        if known and may_stand_in(hidden, self.head, self.embedding.token):
            return fast_cross_entropy(hidden, self.embedding.token.weight, targets, self.head.logit_scale)
        logits = self.lm_head(hidden)
        return F.cross_entropy(logits, targets), (logits.argmax(dim=-1) == targets).sum()

    @property
    def is_plain(self) -> bool:
        """Whether the model is of this very class, so that a fast form can know what it computes."""
        return type(self) is Transformer

    @torch.no_grad()
    def attention_weights(
        self, tokens: Int[Tensor, "B T"], padding_mask: Bool[Tensor, "B T"] | None = None
    ) -> list[Float[Tensor, "B H T S"]]:
        """Each layer's attention weights, for pictures (dropout off): row t says where query t looks."""
        with evaluation_mode(self), recorded(self) as weights:
            self.hidden(tokens, padding_mask)
        return weights

    def generate(self, tokens: Int[Tensor, "B T"], max_new_tokens: int, **options) -> Int[Tensor, "B more"]:
        """Continue each row by `max_new_tokens` words; see `minitransformer.generation.generate` for the options."""
        return generate(self, tokens, max_new_tokens, **options)


def check(model: Transformer, tokens: Tensor, padding_mask: Tensor | None, cache: KVCache | None) -> None:
    """Raise ValueError, with the cure, for what a model cannot read."""
    if tokens.numel() == 0:
        raise ValueError(f"tokens is empty, shape {tuple(tokens.shape)}; give at least one row of one token")
    if tokens.dim() != 2:
        raise ValueError(
            f"tokens must be [B, T], got shape {tuple(tokens.shape)}; tokens[None] makes a batch of one row"
        )
    if padding_mask is not None and (padding_mask.shape != tokens.shape or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"padding_mask must be bool and of the shape of tokens, {tuple(tokens.shape)}, got "
            f"{padding_mask.dtype} {tuple(padding_mask.shape)}; mask.bool() turns a mask of 0 and 1 into one"
        )
    # Behind a cache a row may well receive padding only: its real tokens came earlier.
    looked_at = padding_mask is not None and cache is None and values_are_read(padding_mask)
    if looked_at and not bool(padding_mask.any(dim=1).all()):
        empty = (~padding_mask.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"padding_mask hides every token of row {empty[0]} ({len(empty)} such rows); True marks a real token: "
            f"drop the empty rows, or invert the mask if it marks padding"
        )
    if cache is not None and not model.config.causal:
        raise ValueError("an encoder has no KV cache: earlier tokens would have to see later ones")

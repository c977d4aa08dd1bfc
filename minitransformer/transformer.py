"""The Transformer: embedding, a stack of blocks, a last norm, and scores for every word.

Sources: Radford et al. 2019 (GPT-2: `causal=True, norm="pre"`); Devlin et al. 2019 (BERT: `causal=False, norm="post"`);
Touvron et al. 2023 (Llama: `position="rotary"`, `norm_type="rms"`, `gated=True`, `activation="silu"`, `bias="none"`).

    h = norm(block_L(… block_1(embedding(tokens))))        [B, T, d_model]   (no last norm where norms come "post")
    logits = lm_head(h)                                    [B, T, V]
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.attention import attention_mask, is_transformed, recorded
from minitransformer.block import Block
from minitransformer.cache import KVCache
from minitransformer.checkpointing import checkpoints
from minitransformer.config import TransformerConfig
from minitransformer.embedding import Embedding, Real, Tokens, check_text, values_are_read
from minitransformer.fast.last_position import at_position
from minitransformer.fast.loss import fast_cross_entropy, pays
from minitransformer.fast.stand_in import may_stand_in, says
from minitransformer.generation import generate, stream
from minitransformer.heads import LMHead, MaskedLMHead, UntiedLMHead
from minitransformer.initialization import initialize
from minitransformer.modes import evaluation_mode
from minitransformer.norm import norm_of
from minitransformer.position import Rotary, rotary
from minitransformer.randomness import random_state_restored


class Transformer(nn.Module):
    """A decoder (GPT, Llama) or an encoder (BERT), as its config says; the same seed gives the same fresh weights."""

    is_plain = True  # what a fast form knows; a subclass is not, unless it says so as well

    def __init__(self, config: TransformerConfig, seed: int = 0):
        super().__init__()
        self.config = config
        with random_state_restored(torch.get_default_device()):  # PyTorch's own draws are overwritten below
            self.embedding = Embedding(config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
            self.norm = norm_of(config) if config.norm == "pre" else nn.Identity()
            heads = {"tied": LMHead, "untied": UntiedLMHead, "bert": MaskedLMHead, "none": lambda _: None}
            self.head = heads[config.lm_head](config)
        initialize(self, config.init, config.n_layers, seed)

    def forward(
        self, tokens: Tokens, padding_mask: Real = None, segments: Tokens | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T V"]:
        """Scores for every word at every position (for a decoder: of the next one). Args and errors as in `hidden`."""
        return self.lm_head(self.hidden(tokens, padding_mask, segments, cache))

    def hidden(
        self,
        tokens: Tokens,
        padding_mask: Real = None,
        segments: Tokens | None = None,
        cache: KVCache | None = None,
        asked: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B Q d_model"]:
        """The hidden states after the last norm.

        Args:
            tokens: word numbers, [B, T].
            padding_mask: True = a real token. Padding may stand on either side; it changes no real token's output.
            segments: BERT's token types.
            cache: a `KVCache`, which is read and extended (decoders only).
            asked: one position for each row, if no other is needed: [B, 1, d_model] comes out, and the last block
                computes only these.

        Raises:
            ValueError: tokens, a padding_mask, segments or asked positions that do not fit the model or each other, a
                row without a real token, a text longer than max_len, a cache of another model or other rows.
        """
        check(self, tokens, padding_mask, cache, asked)
        x = self.embedding(tokens, padding_mask, segments, cache)  # [B, n + T, d_model]
        n = x.shape[1] - tokens.shape[1]  # vectors that an embedding may put in front of the words: always real
        real_keys, n_keys = None if padding_mask is None else F.pad(padding_mask, (n, 0), value=True), x.shape[1]
        if cache is not None:
            cache.count(tokens.shape[1], padding_mask)
            real_keys = cache.extend(n_keys, real_keys)
            n_keys = cache.n_keys
        mask = attention_mask(x.shape[1], real_keys, n_keys, self.config.causal, x.device)
        contexts = [None] * len(self.blocks) if cache is None else cache.layers
        if self.config.position == "rotary":
            place = torch.arange(n_keys, device=x.device)[None] if real_keys is None else real_keys.cumsum(dim=1) - 1
            angles = rotary(place[:, -x.shape[1] :], self.config.d_head, self.config.rope_theta)
            contexts = [Rotary(*angles, context) for context in contexts]
        steps = list(self.blocks)
        if asked is not None:
            steps[-1] = partial(at_position, self.blocks[-1], asked=asked + n)
        # Recomputed, a block would extend the cache twice; and torch.func refuses what recomputation needs.
        impossible = cache is not None or is_transformed()
        if self.config.gradient_checkpointing and torch.is_grad_enabled() and not impossible:
            steps = checkpoints(steps)
        for step, context in zip(steps, contexts, strict=True):
            x = step(x, mask, context)
        return self.norm(x[:, n:] if asked is None else x)

    def lm_head(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows V"]:
        """Scores for every word from hidden states: all, or those that are needed. ValueError if there is no head."""
        if self.head is None:
            raise ValueError('this model has no language-model head (config.lm_head is "none"); use model.hidden(...)')
        return self.head(hidden, self.embedding.token)

    def loss(self, tokens: Tokens, targets: Tokens, padding_mask: Real = None) -> Float[Tensor, ""]:
        """Mean cross-entropy, in nats, of the word that `targets` wants at each position; -100 wants none.

        As with the logits of `forward`, which are never there all at once. ValueError as in `hidden`, for no word, or
        for targets that are none or stand at padding.
        """
        check_targets(targets, tokens, padding_mask, self.config.vocab_size)
        hidden, targets = self.hidden(tokens, padding_mask).flatten(0, 1), targets.flatten().long()
        if values_are_read(targets):
            hidden, targets = hidden[targets != -100], targets[targets != -100]
            if len(targets) == 0:
                raise ValueError("targets ask for no word: all are -100, so there is no mean; give at least one word")
        return self.word_loss(hidden, targets)[0]

    def word_loss(
        self, hidden: Float[Tensor, "N d_model"], targets: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Mean cross-entropy, in nats, of the words `targets` from the hidden states that should say them, and how many
        of them score highest."""
        table = self.embedding.token
        known = says(self, "is_plain") and type(self.head) is LMHead
        if known and pays(hidden, table) and may_stand_in(hidden, self, self.head, table):
            return fast_cross_entropy(hidden, table, targets, self.head.logit_scale)
        logits = self.lm_head(hidden)
        return F.cross_entropy(logits, targets), (logits.argmax(dim=-1) == targets).sum()

    @torch.no_grad()
    def attention_weights(self, tokens: Tokens, padding_mask: Real = None) -> list[Float[Tensor, "B H T S"]]:
        """Each layer's attention weights, for pictures (dropout off): row t says where query t looks."""
        with evaluation_mode(self), recorded(self) as weights:
            self.hidden(tokens, padding_mask)
        return weights

    generate = generate
    stream = stream


def check(
    model: Transformer, tokens: Tensor, padding_mask: Tensor | None, cache: KVCache | None, asked: Tensor | None
) -> None:
    """Raise ValueError, with the cure, for what a model cannot read."""
    check_text(tokens, padding_mask)
    if cache is not None:
        if not model.config.causal:
            raise ValueError("an encoder has no KV cache: earlier tokens would have to see later ones")
        cache.check(len(tokens), len(model.blocks))
    if asked is not None and asked.shape != tokens.shape[:1]:
        raise ValueError(f"asked names one position of each row, [{len(tokens)}], got shape {tuple(asked.shape)}")
    if not values_are_read(tokens):
        return
    if asked is not None and not 0 <= int(asked.min()) <= int(asked.max()) < tokens.shape[1]:
        raise ValueError(f"asked positions run from 0 to {tokens.shape[1] - 1}, got {asked.tolist()}")
    # Behind a cache a row may well receive padding only: its real tokens came earlier.
    if padding_mask is not None and cache is None and not bool((rows := padding_mask.any(dim=1)).all()):
        empty = f"row {int(rows.long().argmin())} ({int((~rows).sum())} such rows)"
        cure = "drop the empty rows, or invert the mask if it marks padding"
        raise ValueError(f"padding_mask hides every token of {empty}; True marks a real token: {cure}")


def check_targets(targets: Tensor, tokens: Tensor, padding_mask: Tensor | None, n_words: int) -> None:
    """Raise ValueError, with the cure, unless targets want one of so many words, or none (-100), of each real token."""
    if targets.shape != tokens.shape or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"targets, {targets.dtype} {list(targets.shape)}, are not [N, T], the number of the word that should "
            f"follow each token of {list(tokens.shape)}; answer_loss is for one word a row"
        )
    if not values_are_read(targets):
        return
    asked = targets != -100
    if len(wrong := targets[asked & ((targets < 0) | (targets >= n_words))]):
        raise ValueError(f"the target {int(wrong[0])} is none of the {n_words} words; only -100 asks nothing")
    if padding_mask is not None and bool((asked & ~padding_mask).any()):
        raise ValueError("targets ask padding for a word, which is learned wrongly: make them -100 there")

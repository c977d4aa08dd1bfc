"""The Transformer: embedding, a stack of blocks, a last norm, and scores for every word.

Sources: Radford et al. 2019 (GPT-2: `causal=True, norm="pre"`); Devlin et al. 2019 (BERT: `causal=False, norm="post"`).

    h = norm(block_L(… block_1(embedding(tokens))))        [B, T, d_model]   (no last norm where norms come "post")
    logits = lm_head(h)                                    [B, T, V]
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitransformer.attention import attention_mask
from minitransformer.block import Block
from minitransformer.cache import KVCache
from minitransformer.config import TransformerConfig
from minitransformer.embedding import Embedding, values_are_read
from minitransformer.generation import evaluation_mode, generate
from minitransformer.heads import LMHead, MaskedLMHead
from minitransformer.initialization import initialize


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
        with torch.random.fork_rng(devices=[]):
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
        weights: list | None = None,
        asked: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B Q d_model"]:
        """The hidden states after the last norm.

        Args:
            tokens: word numbers, [B, T].
            padding_mask: True = a real token. Padding may stand on either side; it changes no real token's output.
            segments: BERT's token types.
            cache: a `KVCache`, which is read and extended (decoders only).
            weights: a list that receives each layer's attention weights [B, H, T, S].
            asked: one position for each row, if no other is needed: the last block computes only these, which saves
                most of its work, and [B, 1, d_model] comes out.

        Raises:
            ValueError: a row without a real token, a sequence longer than max_len, a token outside the vocabulary,
                a padding_mask that does not fit the tokens, a cache for an encoder.
        """
        self._check(tokens, padding_mask, cache)
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
        # A block that runs twice would also extend the cache and the list of weights twice.
        once = cache is not None or weights is not None or not torch.is_grad_enabled()
        recompute = self.config.gradient_checkpointing and not once
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[i]
            last = () if asked is None or i + 1 < len(self.blocks) else (asked + n,)
            if recompute:
                # The non-reentrant form: the other one gives no gradient where the block's input needs none, which is
                # so for the first block of every frozen model.
                x = checkpoint(block, x, mask, layer_cache, weights, *last, use_reentrant=False)
            else:
                x = block(x, mask, layer_cache, weights, *last)
        return self.norm(x[:, n:] if asked is None else x)

    def lm_head(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows V"]:
        """Scores for every word from hidden states: all of them, or only those that are needed.

        Raises:
            ValueError: the model was built with `lm_head="none"`.
        """
        if self.head is None:
            raise ValueError('this model has no language-model head (config.lm_head is "none"); use model.hidden(...)')
        return self.head(hidden, self.embedding.token.weight)

    @torch.no_grad()
    def attention_weights(
        self, tokens: Int[Tensor, "B T"], padding_mask: Bool[Tensor, "B T"] | None = None
    ) -> list[Float[Tensor, "B H T S"]]:
        """Each layer's attention weights, for pictures (dropout off): row t says where query t looks."""
        weights: list[Tensor] = []
        with evaluation_mode(self):
            self.hidden(tokens, padding_mask, weights=weights)
        return weights

    def generate(self, tokens: Int[Tensor, "B T"], max_new_tokens: int, **options) -> Int[Tensor, "B more"]:
        """Continue each row by `max_new_tokens` words; see `minitransformer.generation.generate` for the options."""
        return generate(self, tokens, max_new_tokens, **options)

    def _check(self, tokens: Tensor, padding_mask: Tensor | None, cache: KVCache | None) -> None:
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
        if cache is not None and not self.config.causal:
            raise ValueError("an encoder has no KV cache: earlier tokens would have to see later ones")

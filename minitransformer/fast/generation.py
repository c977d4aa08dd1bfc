"""Generation's fast form: one new token for each row, with weights and memory laid out for it once.

Source: Pope et al. 2023, "Efficiently Scaling Transformer Inference", section 2: a step of generation multiplies a few
rows with every weight, so its time is that of reading the weights, and of starting each operation. What is done here
about both, before the first step:

    query, key, value     one weight, one product
    every weight          stored as [d_in, d_out], if many rows will read it in that order
    residual sum          a part of the product: x + h Wᵀ is one operation
    keys and values       room for all that will come; a prefix lies in it like any other key

Shapes: x [B, d_model], the newest token of each row -> logits [B, V]; keys and values [2, B, H, n + S, d_head].

Differs from the plain form (`Block.forward` behind a `KVCache`): in rounding only. It serves blocks whose maps are
linear: plain ones, and wrappers that say so by `as_linear` or `as_attention`. While it is in use, some of the weights
are there twice, and a change of the model goes unnoticed. The cache is taken over, and cannot be read on by the model.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention
from minitransformer.block import Block
from minitransformer.cache import KVCache, LayerCache
from minitransformer.embedding import Embedding, positions
from minitransformer.fast.stand_in import may_stand_in
from minitransformer.feedforward import FeedForward, activate
from minitransformer.heads import LMHead

LinearMap = tuple[Tensor, Tensor | None]  # weight [d_out, d_in] and bias [d_out]
KeysAndValues = tuple[Tensor, Tensor]  # [n, d_model] each


class PlainFormNeededError(Exception):
    """The model computes something that the fast form does not know."""


def linear_map(module: nn.Module) -> LinearMap | None:
    """The weight and the bias by which a module acts at present; None if it does not say, or is no linear map.

    A wrapper says so by a method `as_linear` that returns the same.
    """
    if type(module) is nn.Linear:
        return module.weight, module.bias
    return module.as_linear() if hasattr(module, "as_linear") else None


def plain_attention(module: nn.Module) -> tuple[Attention, KeysAndValues | None] | None:
    """The attention layer in a module, and extra keys and values in front of it; None if it computes anything else.

    A wrapper says so by a method `as_attention` that returns the same.
    """
    if type(module) is Attention:
        return module, None
    return module.as_attention() if hasattr(module, "as_attention") else None


def known(found):
    """`found`, unless it is None: then PlainFormNeededError is raised."""
    if found is None:
        raise PlainFormNeededError
    return found


def relaying_pays(n_rows: int, more: int) -> bool:
    """Whether weights should be stored as [d_in, d_out] for so many rows and steps.

    Measured: up to eight rows read a weight equally well either way, and a dozen steps must pay for the new layout.
    """
    return n_rows > 8 and more >= 16


class ThinLinear:
    """y = x Wᵀ + b for a few rows x. Several maps of one input are joined, their outputs side by side.

    Args:
        maps: weight and bias of each.
        relaid: store the weights as [d_in, d_out]; otherwise a single one is read where it lies, and not copied.
    """

    def __init__(self, *maps: LinearMap, relaid: bool):
        if len(maps) == 1 and not relaid:
            self.weight = maps[0][0].T  # [d_in, d_out]
        else:
            self.weight = torch.cat([w.T for w, _ in maps], dim=1) if relaid else torch.cat([w for w, _ in maps]).T
        biased = any(b is not None for _, b in maps)
        self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in maps]) if biased else None

    def __call__(self, x: Float[Tensor, "B d_in"]) -> Float[Tensor, "B d_out"]:
        """The maps' outputs."""
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def added_to(self, residual: Float[Tensor, "B d_out"], x: Float[Tensor, "B d_in"]) -> Float[Tensor, "B d_out"]:
        """residual + y."""
        out = torch.addmm(residual, x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


class Parts(NamedTuple):
    """What a block amounts to."""

    attention: Attention
    extra: KeysAndValues | None
    read: tuple[LinearMap, ...]  # query, key, value
    output: LinearMap
    up: LinearMap
    down: LinearMap


def parts_of(block: nn.Module) -> Parts:
    """What the block amounts to; PlainFormNeededError if it is more than linear maps and attention."""
    plain = type(block) is Block and type(block.feedforward) is FeedForward
    attention, extra = known(plain_attention(block.attention) if plain else None)
    ffn = block.feedforward
    maps = [attention.query, attention.key, attention.value, attention.output, ffn.up, ffn.down]
    query, key, value, *others = [known(linear_map(part)) for part in maps]
    return Parts(attention, extra, (query, key, value), *others)


class FastAttention:
    """Attention from the newest token of each row to all that it may see, which is kept here.

    Args:
        parts: of the block.
        cache: the keys and values of all earlier tokens.
        real_keys: which of those are real tokens, [B, S]; None: all of them.
        more: how many tokens will come.
        relaid: as in `ThinLinear`.
    """

    def __init__(self, parts: Parts, cache: LayerCache, real_keys: Bool[Tensor, "B S"] | None, more: int, relaid: bool):
        n_rows, self.n_heads, n_tokens, self.d_head = cache.key.shape
        self.read, self.output = ThinLinear(*parts.read, relaid=relaid), ThinLinear(parts.output, relaid=relaid)
        n = 0 if parts.extra is None else len(parts.extra[0])
        self.n_seen = n + n_tokens
        self.seen = cache.key.new_empty(2, n_rows, self.n_heads, self.n_seen + more, self.d_head)
        for place, extra in enumerate(() if parts.extra is None else parts.extra):
            self.seen[place, :, :, :n] = parts.attention.split_heads(extra[None])
        self.seen[0, :, :, n : self.n_seen], self.seen[1, :, :, n : self.n_seen] = cache.key, cache.value
        self.real = None if real_keys is None else F.pad(real_keys, (n, more), value=True)[:, None, None]

    def __call__(self, residual: Float[Tensor, "B d_model"], x: Float[Tensor, "B d_model"]) -> Tensor:
        """residual + what attention makes of x, [B, d_model]; the key and value of x are noted."""
        new = self.read(x).view(-1, 3, self.n_heads, 1, self.d_head).transpose(0, 1)  # [3, B, H, 1, d_head]
        self.seen.narrow(3, self.n_seen, 1).copy_(new[1:])
        self.n_seen += 1
        keys, values = self.seen.narrow(3, 0, self.n_seen).unbind()  # [B, H, n + S, d_head]
        real = None if self.real is None else self.real[..., : self.n_seen]
        heads = F.scaled_dot_product_attention(new[0], keys, values, real)  # [B, H, 1, d_head]
        return self.output.added_to(residual, heads.view(x.shape))


class FastBlock:
    """A block for one new token a row; arguments as in `FastAttention`. Its norms may be wrapped."""

    def __init__(
        self,
        block: Block,
        parts: Parts,
        cache: LayerCache,
        real_keys: Bool[Tensor, "B S"] | None,
        more: int,
        relaid: bool,
    ):
        self.pre_norm, self.activation = block.pre_norm, block.feedforward.activation
        self.norm_attention, self.norm_feedforward = for_rows(block.norm_attention), for_rows(block.norm_feedforward)
        self.attention = FastAttention(parts, cache, real_keys, more, relaid)
        self.up, self.down = ThinLinear(parts.up, relaid=relaid), ThinLinear(parts.down, relaid=relaid)

    def __call__(self, x: Float[Tensor, "B d_model"]) -> Float[Tensor, "B d_model"]:
        """As `Block.forward`, for the newest position."""
        if self.pre_norm:
            x = self.attention(x, self.norm_attention(x))
            return self.down.added_to(x, self.bent(self.norm_feedforward(x)))
        x = self.norm_attention(self.attention(x, x))
        return self.norm_feedforward(self.down.added_to(x, self.bent(x)))

    def bent(self, x: Float[Tensor, "B d_model"]) -> Float[Tensor, "B d_ff"]:
        """The hidden layer of the FFN."""
        return activate(self.up(x), self.activation)


def for_rows(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm for [B, d_model]; a wrapped one may count on [B, T, d_model], and gets it."""
    if type(norm) is nn.LayerNorm:  # its function alone: through the module it takes about twice as long
        shape = norm.normalized_shape
        return partial(torch.layer_norm, normalized_shape=shape, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    return norm.forward if type(norm) is nn.Identity else lambda x: norm(x[:, None])[:, 0]


class FastSteps:
    """A model for one new token a row; see the head of this file.

    Args:
        model: a decoder.
        cache: what it has read so far; its keys and values are taken out of it.
        more: how many tokens will come.

    Raises:
        PlainFormNeededError: the model computes something that this form does not know.
    """

    def __init__(self, model: nn.Module, cache: KVCache, more: int):
        fused = getattr(model, "is_plain", False) and model.config.attention == "fused"
        filled = fused and len(model.blocks) == len(cache.layers) and all(own.key is not None for own in cache.layers)
        known(model if filled and may_stand_in(cache.layers[0].key, *model.modules()) else None)
        parts = [parts_of(block) for block in model.blocks]  # all are known before anything is laid out
        relaid = relaying_pays(len(cache.layers[0].key), more)
        self.model, self.cache = model, cache
        self.blocks = [
            FastBlock(block, own, layer, cache.real_keys, more, relaid)
            for block, own, layer in zip(model.blocks, parts, cache.layers, strict=True)
        ]
        cache.layers.clear()
        self.norm, self.head, self.scale = for_rows(model.norm), model.lm_head, 1.0
        if type(model.head) is LMHead:
            self.head = ThinLinear((model.embedding.token.weight, None), relaid=relaid)
            self.scale = model.head.logit_scale

    @torch.inference_mode()  # less to note for each operation; what comes out is only compared and drawn from
    def __call__(self, words: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """The scores of the word that follows the newest one of each row."""
        x = self.embedded(words)[:, 0]
        self.cache.count(1, None)
        self.cache.extend(1, None)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if self.scale == 1.0 else logits * self.scale

    def embedded(self, words: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 d_model"]:
        """The words' vectors; without checks where the words can only be the vocabulary's own."""
        embedding = self.model.embedding
        if type(embedding) is Embedding and type(self.model.head) is LMHead:
            return embedding.summed(embedding.token(words), positions(words, cache=self.cache))
        return embedding(words, cache=self.cache)


FEWEST_STEPS = 4  # measured: with fewer, laying out takes longer than it saves


def fast_steps(model: nn.Module, cache: KVCache, more: int) -> FastSteps | None:
    """The fast form of `more` steps behind this cache; None where the plain one is needed, or as good."""
    if more < FEWEST_STEPS:
        return None
    try:
        return FastSteps(model, cache, more)
    except PlainFormNeededError:
        return None

"""Generation's fast form: one new token for each row, with weights and memory laid out for it once.

Source: Pope et al. 2023, "Efficiently Scaling Transformer Inference", section 2: a step of generation multiplies a few
rows with every weight, so its time is that of reading the weights, and of starting each operation. What is done here
about both, before the first step:

    query, key, value     one weight, one product
    every weight          stored as [d_in, d_out], if many rows will read it in that order
    keys and values       room for all that will come; a prefix lies in it like any other key

Shapes: x [B, d_model], the newest token of each row -> logits [B, V]; keys and values [2, B, H, n + S, d_head].

Differs from the plain form (`Block.forward` behind a `KVCache`): in rounding only. It serves blocks of linear layers:
plain ones, and wrappers that say so by `as_linear` or `as_attention`. While it is in use, some of the weights are there
twice, and a change of the model goes unnoticed. The cache is taken over, and cannot be read on by the model.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention
from minitransformer.block import Block
from minitransformer.cache import KVCache
from minitransformer.embedding import Embedding, positions
from minitransformer.fast.stand_in import may_stand_in, says
from minitransformer.feedforward import FeedForward, activate
from minitransformer.heads import LMHead

FEWEST_STEPS = 4  # measured: with fewer, laying out takes longer than it saves
Linear = tuple[Tensor, Tensor | None]  # weight [d_out, d_in] and bias [d_out]
Parts = tuple[Attention, tuple[Tensor, Tensor] | None, list[Linear]]


def fast_steps(model: nn.Module, cache: KVCache, more: int) -> "FastSteps | None":
    """The fast form of `more` steps behind this cache; None where the plain one is needed, or as good."""
    known = says(model, "is_plain") and model.config.attention == "fused" and model.config.position == "learned"
    if more < FEWEST_STEPS or not known or len(model.blocks) != len(cache.layers):
        return None
    if any(layer.key is None for layer in cache.layers):  # what stands in the block's place keeps none
        return None
    if not may_stand_in(cache.layers[0].key, *model.modules()):
        return None
    parts = [parts_of(block) for block in model.blocks]  # all are known before anything is laid out
    return None if None in parts else FastSteps(model, cache, parts, more)


def parts_of(block: nn.Module) -> Parts | None:
    """A block's attention layer, keys and values [n, d_model] in front, and its linear layers; None if it is more.

    A wrapper says what it amounts to: `as_attention` returns the first two, `as_linear` a layer's weight and bias.
    """
    if type(block) is not Block or type(block.feedforward) is not FeedForward:
        return None
    own, ffn = block.attention, block.feedforward
    found = (own, None) if type(own) is Attention else getattr(own, "as_attention", lambda: None)()
    if found is None:
        return None
    attention = found[0]
    layers = attention.query, attention.key, attention.value, attention.output, ffn.up, ffn.down
    linear = [(e.weight, e.bias) if type(e) is nn.Linear else getattr(e, "as_linear", lambda: None)() for e in layers]
    return None if None in linear else (*found, linear)


class ThinLinear:
    """y = x Wᵀ + b for a few rows x. Several layers of one input are joined, their outputs side by side.

    `relaid` stores the weights as [d_in, d_out]; otherwise a single one is read where it lies, and not copied.
    """

    def __init__(self, *layers: Linear, relaid: bool):
        weights = [w for w, _ in layers]
        if relaid:
            self.weight = torch.cat([w.T for w in weights], dim=1)  # [d_in, d_out]
        else:
            self.weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).T
        biased = any(b is not None for _, b in layers)
        self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in layers]) if biased else None

    def __call__(self, x: Float[Tensor, "B d_in"]) -> Float[Tensor, "B d_out"]:
        """The layers' outputs."""
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


class FastBlock:
    """A block for the newest token of each row; `seen` [2, B, H, S, d_head] hold what all earlier ones answer.

    `real` says which of those are real tokens (None: all of them); `more` tokens will come. Norms may be wrapped.
    """

    def __init__(
        self, block: Block, parts: Parts, seen: Tensor, real: Bool[Tensor, "B S"] | None, more: int, relaid: bool
    ):
        attention, extra, (query, key, value, *others) = parts
        self.pre_norm, self.activation, self.n_heads = block.pre_norm, block.feedforward.activation, attention.n_heads
        self.norm_attention, self.norm_feedforward = for_rows(block.norm_attention), for_rows(block.norm_feedforward)
        self.read = ThinLinear(query, key, value, relaid=relaid)
        self.output, self.up, self.down = (ThinLinear(layer, relaid=relaid) for layer in others)
        n = 0 if extra is None else len(extra[0])
        if extra is not None:
            front = torch.stack([attention.split_heads(part[None]) for part in extra]).to(
                seen.dtype
            )  # [2, 1, H, n, d_head]
            seen = torch.cat([front.expand(-1, seen.shape[1], -1, -1, -1), seen], dim=3)
        self.n_seen = seen.shape[3]
        self.seen = F.pad(seen, (0, 0, 0, more))  # [2, B, H, n + S + more, d_head]
        self.real = None if real is None else F.pad(real, (n, more), value=True)[:, None, None]

    def __call__(self, x: Float[Tensor, "B d_model"]) -> Float[Tensor, "B d_model"]:
        """As `Block.forward`, for the newest position."""
        if self.pre_norm:
            x = x + self.attention(self.norm_attention(x))
            return x + self.feedforward(self.norm_feedforward(x))
        x = self.norm_attention(x + self.attention(x))
        return self.norm_feedforward(x + self.feedforward(x))

    def attention(self, x: Float[Tensor, "B d_model"]) -> Float[Tensor, "B d_model"]:
        """As `Attention.forward`; the key and value of x are noted."""
        new = self.read(x).view(len(x), 3, self.n_heads, 1, -1).transpose(0, 1)  # [3, B, H, 1, d_head]
        self.seen.narrow(3, self.n_seen, 1).copy_(new[1:])
        self.n_seen += 1
        keys, values = self.seen.narrow(3, 0, self.n_seen).unbind()  # [B, H, n + S, d_head]
        real = None if self.real is None else self.real[..., : self.n_seen]
        return self.output(F.scaled_dot_product_attention(new[0], keys, values, real).view(x.shape))

    def feedforward(self, x: Float[Tensor, "B d_model"]) -> Float[Tensor, "B d_model"]:
        """As `FeedForward.forward`."""
        return self.down(activate(self.up(x), self.activation))


def for_rows(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm for [B, d_model]; a wrapped one may count on [B, T, d_model], and gets it."""
    if type(norm) is nn.LayerNorm:  # its function alone: through the module it takes about twice as long
        shape = norm.normalized_shape
        return partial(torch.layer_norm, normalized_shape=shape, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    return norm.forward if type(norm) is nn.Identity else lambda x: norm(x[:, None])[:, 0]


class FastSteps:
    """A model for one new token a row; see the head of this file. The cache's keys and values are taken out of it."""

    def __init__(self, model: nn.Module, cache: KVCache, parts: list[Parts], more: int):
        # Measured: up to eight rows read a weight equally well either way, and a dozen steps pay for the new layout.
        relaid = len(cache.layers[0].key) > 8 and more >= 16
        self.model, self.cache, self.blocks = model, cache, []
        for block, own in zip(model.blocks, parts, strict=True):
            layer = cache.layers.pop(0)
            seen = torch.stack([layer.key, layer.value])
            self.blocks.append(FastBlock(block, own, seen, cache.real_keys, more, relaid))
        self.norm, self.head, self.scale = for_rows(model.norm), model.lm_head, 1.0
        self.is_tied = type(model.head) is LMHead and type(model.embedding.token) is nn.Embedding
        if self.is_tied:
            self.head = ThinLinear((model.embedding.token.weight, None), relaid=relaid)
            self.scale = model.head.logit_scale

    @torch.inference_mode()  # less to note for each operation; what comes out is only compared and drawn from
    def __call__(self, words: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """The scores of the word that follows the newest one of each row."""
        embedding = self.model.embedding
        if type(embedding) is Embedding and self.is_tied:  # no check: the words can only be the vocabulary's own
            x = embedding.summed(embedding.token(words), positions(words, cache=self.cache))[:, 0]
        else:
            x = embedding(words, cache=self.cache)[:, 0]
        self.cache.count(1, None)
        self.cache.extend(1, None)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if self.scale == 1.0 else logits * self.scale

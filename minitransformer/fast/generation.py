"""Generation's fast form: one new token for each row, with weights and memory laid out for it once.

Source: Pope et al. 2023, "Efficiently Scaling Transformer Inference", section 2: a step of generation multiplies a few
rows with every weight, so its time is that of reading the weights, and of starting each operation. What is done here
about both, before the first step:

    query, key, value     one weight, one product, where copying them costs less than it saves
    many rows             as the columns of a product: W xᵀ reads W in a better order than x Wᵀ
    keys and values       room for all that will come; a prefix lies in it like any other key

Shapes: x [B, d_model], the newest token of each row -> logits [B, V]; keys and values [B, 2 H_kv, n + S, d_head].

Differs from the plain form (`Block.forward` behind a `KVCache`): in rounding only. It serves blocks of linear layers:
plain ones, and wrappers that say so by `as_linear` or `as_attention`. While it is in use, some of the weights are there
twice, and a change of the model goes unnoticed. The cache is taken over, and cannot be read on by the model.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention, GroupedQueryAttention
from minitransformer.block import Block
from minitransformer.cache import KVCache, LayerCache
from minitransformer.config import TransformerConfig
from minitransformer.embedding import Embedding, positions
from minitransformer.fast.stand_in import may_stand_in, says
from minitransformer.feedforward import FeedForward, GatedFeedForward, activate
from minitransformer.heads import LMHead
from minitransformer.norm import RMSNorm
from minitransformer.position import rotary

FEWEST_STEPS = 4  # measured: with fewer, laying out takes longer than it saves
FEW = 7  # measured, in 32 bits and in 16: more rows meet a weight better as columns, fewer as rows
COPIED = 2**11  # measured: copying as many numbers takes as long as one product less saves in one step
Linear = tuple[Tensor, Tensor | None]  # weight [d_out, d_in] and bias [d_out]
Parts = tuple[Attention, tuple[Tensor, Tensor] | None, list[Linear]]
Rows = Float[Tensor, "B d_model"]
Turn = tuple[Float[Tensor, "#B heads d_head"], Float[Tensor, "#B heads d_head"]]


def fast_steps(model: nn.Module, cache: KVCache, more: int) -> "FastSteps | None":
    """The fast form of `more` steps behind this cache; None where the plain one is needed, or as good."""
    known = says(model, "is_plain") and model.config.attention == "fused"
    if more < FEWEST_STEPS or not known or any(layer.key is None for layer in cache.layers):  # a block that keeps none
        return None
    if not may_stand_in(cache.layers[0].key, *model.modules()):
        return None
    parts = [parts_of(block) for block in model.blocks]  # all are known before anything is laid out
    return None if None in parts else FastSteps(model, cache, parts, more)


def parts_of(block: nn.Module) -> Parts | None:
    """A block's attention layer, keys and values [n, d_model] in front, and its linear layers; None if it is more.

    A wrapper says what it amounts to: `as_attention` returns the first two, `as_linear` a layer's weight and bias.
    """
    if type(block) is not Block or type(block.feedforward) not in (FeedForward, GatedFeedForward):
        return None
    own, ffn = block.attention, block.feedforward
    plain = type(own) in (Attention, GroupedQueryAttention)
    found = (own, None) if plain else getattr(own, "as_attention", lambda: None)()
    if found is None:
        return None
    attention, gate = found[0], [ffn.gate] if type(ffn) is GatedFeedForward else []
    layers = attention.query, attention.key, attention.value, attention.output, ffn.down, *gate, ffn.up
    linear = [(e.weight, e.bias) if type(e) is nn.Linear else getattr(e, "as_linear", lambda: None)() for e in layers]
    return None if None in linear else (*found, linear)


def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """y = x Wᵀ + b. Many rows stand side by side: y = (W xᵀ + b)ᵀ."""
    across = weight.T

    def times(x: Float[Tensor, "B d_in"]) -> Float[Tensor, "B d_out"]:
        if x.shape[0] > FEW:
            return (torch.mm(weight, x.T) if bias is None else torch.addmm(bias[:, None], weight, x.T)).T
        return torch.mm(x, across) if bias is None else torch.addmm(bias, x, across)

    return times


def joined(*layers: Linear, more: int) -> Callable[[Tensor], Tensor]:
    """The `product` of several layers with one input, their outputs side by side, `more` times."""
    if sum(w.numel() for w, _ in layers) > (len(layers) - 1) * more * COPIED:
        products = [product(*layer) for layer in layers]
        return lambda x: torch.cat([times(x) for times in products], dim=1)
    biases = [w.new_zeros(len(w)) if b is None else b for w, b in layers]
    return product(torch.cat([w for w, _ in layers]), None if all(b is None for _, b in layers) else torch.cat(biases))


def for_rows(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm for [B, d_model]; a wrapped one may count on [B, T, d_model], and gets it."""
    if type(norm) is RMSNorm:
        d, wide = len(norm.weight), norm.weight.detach().to(torch.promote_types(norm.weight.dtype, torch.float32))
        return partial(rms_norm, weight=wide * d**0.5, root=wide.new_tensor((d * norm.eps) ** 0.5))
    if type(norm) is not nn.LayerNorm:
        return lambda x: norm(x[:, None])[:, 0]
    shape = norm.normalized_shape  # its function alone: through the module it takes about twice as long
    return partial(torch.layer_norm, normalized_shape=shape, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def rms_norm(x: Rows, weight: Tensor, root: Tensor) -> Rows:
    """As `RMSNorm.forward`, in as few operations as there are: x √d g / √(|x|² + d eps)."""
    wide = x.to(weight.dtype)
    return (wide * weight).div_(torch.linalg.vector_norm(wide, dim=1, keepdim=True).hypot_(root)).to(x.dtype)


class FastBlock:
    """A block for the newest token of each row; `cache` holds what all earlier ones answer. Norms may be wrapped.

    `real` [B, S] says which of those are real tokens (None: all of them); `more` tokens will come.
    """

    def __init__(self, block: Block, parts: Parts, cache: LayerCache, real: Tensor | None, more: int):
        attention, extra, (query, key, value, output, down, *ups) = parts
        self.pre_norm, self.activation = block.pre_norm, block.feedforward.activation
        self.n_kv_heads, self.d_head = cache.key.shape[1], cache.key.shape[3]
        self.norm_attention, self.norm_feedforward = for_rows(block.norm_attention), for_rows(block.norm_feedforward)
        self.read = joined(query, key, value, more=more)
        self.output, self.down, *self.ups = (product(*layer) for layer in (output, down, *ups))
        seen, n = torch.cat([cache.key, cache.value], dim=1), 0 if extra is None else len(extra[0])
        if extra is not None:
            front = torch.cat([attention.split_heads(part[None]) for part in extra], dim=1)  # [1, 2 H_kv, n, d_head]
            seen = torch.cat([front.to(seen.dtype).expand(len(seen), -1, -1, -1), seen], dim=2)
        self.n_seen = seen.shape[2]
        self.seen = F.pad(seen, (0, 0, 0, more))  # [B, 2 H_kv, n + S + more, d_head]
        self.real = None if real is None else F.pad(real, (n, more), value=True)[:, None, None]

    def __call__(self, x: Rows, turn: Turn | None) -> Rows:
        """As `Block.forward`, for the newest position."""
        if self.pre_norm:
            x = x + self.attention(self.norm_attention(x), turn)
            return x + self.feedforward(self.norm_feedforward(x))
        x = self.norm_attention(x + self.attention(x, turn))
        return self.norm_feedforward(x + self.feedforward(x))

    def feedforward(self, x: Rows) -> Rows:
        """As `FeedForward.forward`, or `GatedFeedForward.forward`."""
        hidden = activate(self.ups[0](x), self.activation)
        return self.down(hidden if len(self.ups) == 1 else hidden.mul_(self.ups[1](x)))

    def attention(self, x: Rows, turn: Turn | None) -> Rows:
        """As `Attention.forward`; the key and value of x are noted.

        The newest query sees all keys, so those of one group can stand side by side where other queries of the text
        would: H_kv heads of H / H_kv queries.
        """
        new = self.read(x).contiguous().view(len(x), -1, self.d_head)  # [B, H + 2 H_kv, d_head]
        if turn is not None:
            new = torch.addcmul(new * turn[0], new.roll(self.d_head // 2, dims=2), turn[1]).to(new.dtype)
        q, newest = new.split([new.shape[1] - 2 * self.n_kv_heads, 2 * self.n_kv_heads], dim=1)
        self.seen.select(2, self.n_seen).copy_(newest)
        self.n_seen += 1
        keys, values = self.seen.narrow(2, 0, self.n_seen).chunk(2, dim=1)  # [B, H_kv, n + S, d_head]
        real = None if self.real is None else self.real[..., : self.n_seen]
        q = q.view(len(x), self.n_kv_heads, -1, self.d_head)  # [B, H_kv, H / H_kv, d_head]
        return self.output(F.scaled_dot_product_attention(q, keys, values, real).flatten(1))


def next_turn(config: TransformerConfig, cache: KVCache, device: torch.device) -> Turn | None:
    """What turns all heads at the position behind the cache: y ↦ cos y + sin (y, its halves swapped).

    As `rotated` for queries and keys; values are not turned: there cos is 1, and sin is 0.
    """
    if config.position != "rotary":
        return None
    real = cache.real_keys
    position = torch.full((1, 1), cache.n_keys, device=device) if real is None else real.sum(dim=1, keepdim=True)
    cos, sin = (angle[:, 0] for angle in rotary(position, config.d_head, config.rope_theta))  # [B, 1, d_head / 2]
    n_values = config.n_kv_heads or config.n_heads  # they lie behind queries and keys
    both = (torch.cat([cos, cos], dim=2), 1.0), (torch.cat([-sin, sin], dim=2), 0.0)
    cos, sin = (
        F.pad(t.expand(-1, config.n_heads + n_values, -1), (0, 0, 0, n_values), value=value) for t, value in both
    )
    return cos, sin


class FastSteps:
    """A model for one new token a row; see the head of this file. The cache's keys and values are taken out of it."""

    def __init__(self, model: nn.Module, cache: KVCache, parts: list[Parts], more: int):
        self.model, self.cache, self.blocks = model, cache, []
        for block, own in zip(model.blocks, parts, strict=True):
            self.blocks.append(FastBlock(block, own, cache.layers.pop(0), cache.real_keys, more))
        self.norm, self.head, table = for_rows(model.norm), model.lm_head, model.embedding.token
        self.is_tied = type(model.head) is LMHead and type(table) is nn.Embedding
        if self.is_tied:
            scale = model.head.logit_scale
            self.head = product(table.weight if scale == 1.0 else scale * table.weight, None)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Go on with these rows alone; the cache's owner drops them there."""
        for block in self.blocks:
            block.seen = block.seen[rows]
            block.real = None if block.real is None else block.real[rows]

    @torch.inference_mode()  # less to note for each operation; what comes out is only compared and drawn from
    def __call__(self, words: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """The scores of the word that follows the newest one of each row."""
        embedding = self.model.embedding
        if type(embedding) is Embedding and self.is_tied:  # no check: the words can only be the vocabulary's own
            x = embedding.summed(embedding.token(words), positions(words, cache=self.cache))[:, 0]
        else:
            x = embedding(words, cache=self.cache)[:, 0]
        turn = next_turn(self.model.config, self.cache, words.device)
        self.cache.count(1, None)
        self.cache.extend(1, None)
        for block in self.blocks:
            x = block(x, turn)
        return self.head(self.norm(x))

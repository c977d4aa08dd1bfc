"""A layer with a quantised weight: stored as bytes, and unpacked where it is needed.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.

    y = W x + b                       W = unpack(bytes), made for this product and forgotten
    dL/dx = Wᵀ dL/dy                  W is unpacked again

A step of training is smaller than the distance of two codes, so a quantised weight cannot learn. It lets the gradient
through to what can: LoRA's factors, or any other method's tensors, which stay in full precision beside it ("QLoRA").

Shapes: x [..., d_in], W [d_out, d_in], y [..., d_out]. How bytes become weights: `code_book.py`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.code_book import Bytes, Weight

PART = 2**12  # rows of a table that are unpacked at a time
Unpack = Callable[..., Weight]  # from the bytes to float32


class Quantized(nn.Module):
    """A frozen weight of some `shape`, stored as bytes: parameters that can require no gradient, and that no cast
    changes.

    `weight` unpacks them, in the precision of the model, at each reading; it cannot be set. `.to(torch.bfloat16)`
    rounds what comes out, not what is stored.
    """

    def store(self, unpack: Unpack, stored: dict[str, Bytes], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Let the weight be `unpack(*stored.values())`."""
        self.unpack, self.names, self.shape = unpack, tuple(stored), shape
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        like = torch.empty(0, dtype=dtype, device=next(iter(stored.values())).device)
        self.register_buffer("like", like, persistent=False)  # which casts change

    @property
    def stored(self) -> list[Bytes]:
        """What the weight is unpacked from."""
        return [getattr(self, name) for name in self.names]

    @property
    def weight(self) -> Weight:
        """The whole weight, in the precision of the model."""
        return self.unpack(*self.stored).to(self.like.dtype)

    @property
    def bits(self) -> float:
        """Of each weight, its share of the scales included."""
        return 8 * sum(tensor.numel() for tensor in self.stored) / math.prod(self.shape)


def unpacking(weight: Weight | nn.Module) -> tuple[Unpack, list[Tensor]]:
    """How a weight is made, and of what: of the bytes of a quantised layer; that of a plain layer, or a tensor, is as
    it is."""
    if isinstance(weight, Quantized):
        return weight.unpack, weight.stored
    return _as_it_is, [weight if isinstance(weight, Tensor) else weight.weight]


def _as_it_is(weight: Weight) -> Weight:
    return weight


def precision(layer: nn.Module) -> torch.dtype:
    """That of the layer's weight, which is not unpacked for it."""
    return (layer.like if isinstance(layer, Quantized) else layer.weight).dtype


def take_over(layer: nn.Module, old: nn.Module, **parameters: nn.Parameter | None) -> nn.Module:
    """Let a new layer with these parameters be all else that the old one is: its sizes, its mode, its hooks, what
    others have noted on it. Returns it."""
    nn.Module.__init__(layer)  # that of a linear layer would make a weight
    left = {"_parameters", "_buffers", "_non_persistent_buffers_set", "unpack", "names", "shape"}
    vars(layer).update({name: value for name, value in vars(old).items() if name not in left})
    for name, parameter in parameters.items():
        layer.register_parameter(name, parameter)
    return layer


class QuantizedLinear(Quantized, nn.Linear):
    """A linear layer with a quantised weight. The bias is a parameter as ever."""

    position_wise = True

    def __init__(self, unpack: Unpack, stored: dict[str, Bytes], like: nn.Linear):
        take_over(self, like, bias=like.bias)
        self.store(unpack, stored, tuple(like.weight.shape), like.weight.dtype)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """W x + b."""
        return FrozenProduct.apply(x, self.bias, self.unpack, self.like.dtype, *self.stored)

    def plain(self) -> nn.Linear:
        """A linear layer with this weight, frozen."""
        weight = nn.Parameter(self.weight, requires_grad=False)
        return take_over(nn.Linear.__new__(nn.Linear), self, weight=weight, bias=self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.bits:.4g} bits a weight"


class QuantizedEmbedding(Quantized, nn.Embedding):
    """An embedding with a quantised table, of which each row is unpacked by itself."""

    def __init__(self, unpack: Unpack, stored: dict[str, Bytes], like: nn.Embedding):
        take_over(self, like)
        self.store(unpack, stored, tuple(like.weight.shape), like.weight.dtype)

    def forward(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows d_model"]:
        """The rows of these numbers."""
        rows = self.unpack(*[tensor.index_select(0, tokens.flatten()) for tensor in self.stored])
        return rows.to(self.like.dtype).view(*tokens.shape, -1)

    def scores(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows V"]:
        """E h, a tied head's product, with a part of the table unpacked at a time."""
        parts = zip(*[tensor.split(PART) for tensor in self.stored], strict=True)
        products = [FrozenProduct.apply(hidden, None, self.unpack, self.like.dtype, *part) for part in parts]
        return torch.cat(products, dim=-1)

    def plain(self) -> nn.Embedding:
        """An embedding with this table, frozen."""
        return take_over(
            nn.Embedding.__new__(nn.Embedding), self, weight=nn.Parameter(self.weight, requires_grad=False)
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.bits:.4g} bits a weight"


class FrozenProduct(torch.autograd.Function):
    """y = W x + b and its gradients, for x and b; W's bytes are kept for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, bias, unpack, dtype, *stored):
        """W x + b."""
        return F.linear(x, unpack(*stored).to(dtype), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.unpack, _, *stored = inputs
        ctx.save_for_backward(*stored)

    @staticmethod
    def backward(ctx, g):
        needs_x, needs_bias, *others = ctx.needs_input_grad
        dx = g @ ctx.unpack(*ctx.saved_tensors).to(g.dtype) if needs_x else None
        db = g.reshape(-1, g.shape[-1]).sum(dim=0) if needs_bias else None
        return dx, db, *[None for _ in others]

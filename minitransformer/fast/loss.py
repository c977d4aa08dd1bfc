"""The next-word loss's fast form: LM head and cross-entropy in one, some positions and some words at a time.

Source: Wijmans et al. 2025, "Cut Your Losses in Large-Vocabulary Language Models" (its abstract), for the idea that the
logits need never be there all at once; Milakov & Gimelshein 2018, "Online normalizer calculation for softmax",
algorithm 3, for a softmax whose words come in parts; the gradients follow from the cross-entropy by the chain rule.

    z = s E h              L = mean (log sum_v exp z_v - z_t)              p = softmax(z),  t the right word

    dL/dz = (p - onehot(t)) / N          dL/dh = s (Σ_v p_v E_v - E_t) / N          dL/dE = s (p - onehot(t))ᵀ h / N

The plain form makes four tensors [N, V]: z, log p, and a gradient of each. This form makes a tile [rows, words] of z at
a time, small enough for a processor's cache, and the gradients right there, since the only thing that may still come
from above is one factor for all. For dL/dE, which needs the finished softmax, each tile is made twice. Of a quantised E
the words of a tile are unpacked, and no more.

Shapes: h [N, d_model], E [V, d_model], t [N].

Differs from the plain form: in rounding only. It refuses to be differentiated twice.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.quantized_layer import QuantizedEmbedding, precision, unpacking

ROWS, WORDS = 2**10, 2**10  # of a tile: 4 MiB
WORTH_IT = ROWS * WORDS  # logits in all: with fewer the plain form is as good


def pays(hidden: Tensor, table: nn.Module) -> bool:
    """Whether the fast form serves for this embedding: a known one, in one full precision, and where it costs less."""
    if type(table) not in (nn.Embedding, QuantizedEmbedding):
        return False
    packed = type(table) is QuantizedEmbedding  # whose plain form leaves a node, and a hole in memory, for each part
    full = hidden.dtype == precision(table) and hidden.dtype in (torch.float32, torch.float64)
    return full and (packed or len(hidden) * table.num_embeddings >= WORTH_IT)


def fast_cross_entropy(
    hidden: Float[Tensor, "N d_model"],
    embedding: Float[Tensor, "V d_model"] | nn.Embedding,
    targets: Int[Tensor, "N"],
    scale: float = 1.0,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Mean cross-entropy in nats of the words `targets` under softmax(scale * E h), and how many score highest.

    `embedding` is E, or holds it.
    """
    unpack, stored = unpacking(embedding)
    learns = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, stored[0])]
    return FastCrossEntropy.apply(hidden, targets, float(scale), *learns, unpack, *stored)


class FastCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one walk over the tiles; the backward pass only multiplies them by a factor."""

    @staticmethod
    def forward(ctx, hidden, targets, scale, hidden_learns, embedding_learns, unpack, *stored):
        n, loss, correct = len(hidden), hidden.new_zeros(()), targets.new_zeros(())
        hidden_gradient = torch.empty_like(hidden) if hidden_learns else None
        embedding_gradient = torch.zeros_like(stored[0]) if embedding_learns else None
        room = hidden.new_empty(min(n, ROWS) * min(len(stored[0]), WORDS))  # used again for every tile
        for start in range(0, n, ROWS):
            rows = slice(start, start + ROWS)
            h, target = scale * hidden[rows], targets[rows, None].long()
            highest, total, own, best, pull = _softmax_in_parts(h, target, room, hidden_learns, unpack, stored)
            loss += ((highest - own) + total.log()).sum()  # of large numbers: they meet first
            correct += (best == target).sum()
            if hidden_learns:
                right = unpack(*[tensor.index_select(0, target[:, 0]) for tensor in stored])
                torch.mul(pull.div_(total).sub_(right), scale / n, out=hidden_gradient[rows])
            if embedding_learns:
                for words, E in _parts(unpack, stored, h.dtype):
                    p = _tile(h, E, room).sub_(highest).exp_().div_(total)
                    embedding_gradient[words].addmm_(p.T, h, alpha=1 / n)
                embedding_gradient.index_add_(0, target[:, 0], h, alpha=-1 / n)
        ctx.n_stored = len(stored)
        ctx.save_for_backward(hidden_gradient, embedding_gradient)
        ctx.mark_non_differentiable(correct)
        return loss / n, correct

    @staticmethod
    def backward(ctx, factor, _):
        if torch.is_grad_enabled():  # create_graph=True: the gradients would be taken for constants
            cure = "take the plain one, torch.nn.functional.cross_entropy(model.lm_head(hidden), targets)"
            raise RuntimeError(f"the fast form of the loss cannot be differentiated twice; {cure}")
        dh, dE = (None if own is None else factor * own for own in ctx.saved_tensors)
        return dh, None, None, None, None, None, dE, *[None] * (ctx.n_stored - 1)


def _softmax_in_parts(
    h: Tensor, target: Tensor, room: Tensor, pulls: bool, unpack: Callable, stored: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Of each row: max z, sum exp(z - max z), z_t, the first word with max z, and sum exp(z - max z) E. Milakov &
    Gimelshein 2018, algorithm 3: what was summed up so far is made smaller whenever a higher z is met."""
    highest, total = h.new_full((len(h), 1), -torch.inf), h.new_zeros(len(h), 1)
    own, best = torch.empty_like(total), torch.zeros_like(target)
    pull = torch.zeros_like(h) if pulls else None
    for words, E in _parts(unpack, stored, h.dtype):
        z = _tile(h, E, room)  # [rows, words]
        here = target - words.start
        own = torch.where((here >= 0) & (here < len(E)), z.gather(1, here.clamp(0, len(E) - 1)), own)
        top, at = z.max(dim=1, keepdim=True)
        best = torch.where(top > highest, words.start + at, best)
        shrink = (highest - (highest := torch.maximum(highest, top))).exp_()
        grown = z.sub_(highest).exp_()
        total.mul_(shrink).add_(grown.sum(dim=1, keepdim=True))
        if pulls:
            pull.mul_(shrink).addmm_(grown, E)
    return highest, total, own, best, pull


def _parts(unpack: Callable, stored: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The embedding's rows, `WORDS` at a time."""
    for start in range(0, len(stored[0]), WORDS):
        words = slice(start, start + WORDS)
        yield words, unpack(*[tensor[words] for tensor in stored]).to(dtype)


def _tile(h: Tensor, E: Tensor, room: Tensor) -> Tensor:
    """h Eᵀ in this room."""
    return torch.mm(h, E.T, out=room[: len(h) * len(E)].view(len(h), len(E)))

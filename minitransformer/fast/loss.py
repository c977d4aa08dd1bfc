"""The next-word loss's fast form: LM head and cross-entropy in one, a few hundred words at a time.

Source: Wijmans et al. 2025, "Cut Your Losses in Large-Vocabulary Language Models" (its abstract), for the idea that the
logits need never be there all at once; the gradients follow from the cross-entropy by the chain rule.

    z = s E h              L = mean (log sum_v exp z_v - z_t)              p = softmax(z),  t the right word

    dL/dz = (p - onehot(t)) / N          dL/dh = s (p E - E_t) / N          dL/dE = s (p - onehot(t))ᵀ h / N

The plain form makes four tensors [N, V]: z, log p, and a gradient of each. This form makes [rows, V] at a time, small
enough for a processor's cache, and the gradients right there, since the only thing that may still come from above is
one factor for all.

Shapes: h [N, d_model], E [V, d_model], t [N].

Differs from the plain form: in rounding only. It refuses to be differentiated twice.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 2**20  # logits at a time: 4 MiB
WORTH_IT = CHUNK  # logits in all: with fewer the plain form is as good


def pays(hidden: Tensor, embedding: Tensor) -> bool:
    """Whether the fast form serves: in one full precision, and where it costs less."""
    full = hidden.dtype == embedding.dtype and hidden.dtype in (torch.float32, torch.float64)
    return full and len(hidden) * len(embedding) >= WORTH_IT


def fast_cross_entropy(
    hidden: Float[Tensor, "N d_model"],
    embedding: Float[Tensor, "V d_model"],
    targets: Int[Tensor, "N"],
    scale: float = 1.0,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Mean cross-entropy in nats of the words `targets` under softmax(scale * E h), and how many score highest."""
    learns = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, embedding)]
    return FastCrossEntropy.apply(hidden, embedding, targets, float(scale), *learns)


class FastCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one walk over chunks of words; the backward pass only multiplies them by a factor."""

    @staticmethod
    def forward(ctx, hidden, embedding, targets, scale, hidden_learns, embedding_learns):
        n, n_words = len(hidden), len(embedding)
        at_a_time = max(1, min(n, CHUNK // n_words))
        z_room, p_room = hidden.new_empty(2, at_a_time, n_words)  # used again for every chunk
        loss, correct = hidden.new_zeros(()), targets.new_zeros(())
        hidden_gradient = torch.empty_like(hidden) if hidden_learns else None
        embedding_gradient = torch.zeros_like(embedding) if embedding_learns else None
        for start in range(0, n, at_a_time):
            rows = slice(start, min(start + at_a_time, n))
            h, target = scale * hidden[rows], targets[rows, None]
            z = torch.mm(h, embedding.T, out=z_room[: len(h)])  # [rows, V]
            p = torch.softmax(z, dim=-1, out=p_room[: len(h)])
            own, highest = z.gather(1, target), z.amax(dim=-1, keepdim=True)
            # log sum exp z = max z - log max p, in which no logarithm of 0 can occur; large numbers meet first
            loss += ((highest - own) - p.amax(dim=-1, keepdim=True).log()).sum()
            best = (own == highest).flatten().nonzero().flatten()  # of several highest words, argmax takes the first
            correct += (z[best].argmax(dim=-1) == target[best, 0]).sum()
            p.scatter_add_(1, target, -torch.ones_like(own))  # p - onehot(t)
            if hidden_learns:
                torch.mm(p, embedding, out=hidden_gradient[rows]).mul_(scale / n)
            if embedding_learns:
                torch.addmm(embedding_gradient, p.T, h, alpha=1 / n, out=embedding_gradient)
        ctx.save_for_backward(hidden_gradient, embedding_gradient)
        ctx.mark_non_differentiable(correct)
        return loss / n, correct

    @staticmethod
    def backward(ctx, factor, _):
        if torch.is_grad_enabled():  # create_graph=True: the gradients would be taken for constants
            cure = "take the plain one, torch.nn.functional.cross_entropy(model.lm_head(hidden), targets)"
            raise RuntimeError(f"the fast form of the loss cannot be differentiated twice; {cure}")
        return *(None if own is None else factor * own for own in ctx.saved_tensors), None, None, None, None

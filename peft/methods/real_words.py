"""Starting from real words: the activations that words of the vocabulary have in each layer.

Source: Li & Liang 2021, section 7.4: a prefix that starts from the activations of real words learns from little data
far better than one that starts from random numbers. Lester et al. 2021, section 3.2, found the same for prompts.

Activations are those of the frozen model, with every method off, so it makes no difference which one came first. Words
are drawn from the whole vocabulary: the model does not know what in it is none (padding, say); `init_tokens` does.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention
from minitransformer.modes import evaluation_mode
from minitransformer.transformer import Transformer
from peft.method import Method, Wrapper, switched_off, unwrapped
from peft.methods.options import Count, Deviation


@dataclass(frozen=True)
class LearnedPositions(Method):
    """A method that learns what stands at n positions in front of the text. ValueError for an option without effect.

    Args:
        length: n, the number of positions.
        init: "normal" starts from N(0, init_std²); any other choice of the method from real words.
        init_std: standard deviation of "normal".
        init_tokens: the real words, `length` word numbers; None draws them from the whole vocabulary.
    """

    length: Count = 8
    init: str = "normal"
    init_std: Deviation = 1.0
    init_tokens: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        words = self.init_tokens
        if self.init == "normal" and words is not None:
            raise ValueError('init_tokens would be ignored by init="normal"; leave one of them out')
        if self.init != "normal" and self.init_std != 1.0:
            raise ValueError('init_std would be ignored: it goes with init="normal"')
        if words is not None and len(words) != self.length:
            raise ValueError(f"init_tokens has {len(words)} words, but length is {self.length}")

    def words(self, table: nn.Embedding, generator: torch.Generator) -> Int[Tensor, "n"]:
        """The numbers of the real words in a table of word vectors: the same ones for every layer of one `attach`."""
        words = self.init_tokens
        if words is None:
            again = torch.Generator().manual_seed(generator.initial_seed())
            words = torch.randint(table.num_embeddings, (self.length,), generator=again, device="cpu").tolist()
        return torch.tensor(words, device=next(table.parameters()).device)

    @torch.no_grad()
    def activations(self, attention: Attention, model: nn.Module, generator: torch.Generator) -> Float[Tensor, "1 n d"]:
        """What that attention layer reads at each word; ValueError outside a Transformer, or for an unknown word."""
        around = [m for m in model.modules() if isinstance(m, Transformer) and any(p is attention for p in m.modules())]
        if not around:
            raise ValueError('no minitransformer Transformer is round this attention layer; choose init="normal"')
        embedding, read = unwrapped(around[0].embedding), []
        look = attention.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            with evaluation_mode(model), switched_off(*[m for m in model.modules() if isinstance(m, Wrapper)]):
                for piece in self.words(embedding.token, generator).split(embedding.room):  # it may exceed max_len
                    around[0].hidden(piece[None])
        finally:
            look.remove()
        return torch.cat(read, dim=1)

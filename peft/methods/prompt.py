"""Prompt tuning: n learned vectors in front of the text, at the input only.

Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2.

    x = [P ; E(tokens)]                                  P [n, d_model], E(tokens) [B, T, d_model]

The prompt passes through every layer like words do: it takes the positions 0 to n - 1, the text starts at n, and both
together must fit into max_len. Outputs are those of the text. Trained: n d_model parameters in all, a prefix's share of
one half layer. The paper's finding is that this is enough for models of ten billion parameters, and not for small ones.

Differs from the paper: T5's relative positions are learned absolute ones here, so the text's positions move.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.cache import KVCache
from minitransformer.config import TransformerConfig
from minitransformer.embedding import Embedding, Real, Tokens, check
from peft.functional import prepend
from peft.method import Wrapper, normal, parameter_like, unwrapped
from peft.methods.options import one_of
from peft.methods.real_words import LearnedPositions


@dataclass(frozen=True)
class PromptTuning(LearnedPositions):
    """Recipe: a soft prompt of `length` vectors. The options are those of `LearnedPositions`: init="tokens" starts from
    the embeddings of real words, the paper's "sampled vocabulary".

    Raises:
        ValueError: what `LearnedPositions` refuses; on attaching, a prompt as long as max_len.
    """

    init: one_of("tokens", "normal") = "tokens"

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """The embedding."""
        return [name for name, module in modules.items() if isinstance(module, Embedding)]

    def wrap(self, name: str, module: Embedding, model: nn.Module, generator: torch.Generator) -> "PromptEmbedding":
        self.check_room(module.room)
        if self.init == "normal":
            return PromptEmbedding(module, normal((self.length, module.token.embedding_dim), self.init_std, generator))
        words = self.words(module.token, generator)
        check(module, words[None], torch.zeros_like(words)[None])
        return PromptEmbedding(module, module.token(words))

    def check_room(self, room: int) -> None:
        """Raise ValueError if no token fits behind the prompt."""
        if self.length >= room:
            raise ValueError(f"a prompt of {self.length} vectors leaves no room for text; max_len is {room}")

    def expected_parameters(self, config: TransformerConfig) -> int:
        """n d_model; ValueError as in `attach`."""
        self.check_room(config.max_len)
        return self.length * config.d_model


class PromptEmbedding(Wrapper):
    """An embedding that puts `prompt` [n, d_model] in front of the words of every row."""

    def __init__(self, base: Embedding, prompt: Float[Tensor, "n d_model"]):
        super().__init__(base)
        self.prompt = parameter_like(prompt, base)

    @property
    def token(self) -> nn.Embedding:
        """The table of word vectors, which the tied LM head reads."""
        return unwrapped(self.base).token

    @property
    def room(self) -> int:
        """How many tokens a text may have behind the prompt."""
        return unwrapped(self.base).room - len(self.prompt) * self.enabled

    def forward(
        self, tokens: Tokens, real: Real = None, segments: Tokens | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B nT d_model"]:
        """[P ; E(tokens)] with positions; behind a cache that holds the prompt already, E(tokens) alone."""
        if not self.enabled:
            return self.base(tokens, real, segments, cache)
        n, behind = len(self.prompt), KVCache(0)
        behind.n_tokens = n if cache is None else n + cache.n_tokens  # where the text's positions begin
        text = self.base(tokens, real, segments, behind)
        if cache is not None and not cache.is_empty:
            return text
        prompt = self.prompt.to(text.dtype).expand(len(text), -1, -1)
        return prepend(unwrapped(self.base).summed(prompt, torch.arange(n, device=text.device)[None]), text)

"""Multiple choice by likeness: a question and its answer should lie close together.

    score(question, answer) = s * cos(e(question), e(answer))          e: mean over real tokens of the hidden states

Source: Karpukhin et al. 2020, "Dense Passage Retrieval", section 3: question and answer are encoded apart and compared
by their product; Reimers & Gurevych 2019, section 3, for one encoder on both sides. Nothing has to be learned before it
can be used: an encoder of sentences answers better than chance as it is.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.heads import mean_pool
from minitransformer.tasks.dataset import without_padding
from minitransformer.transformer import Transformer


class DualEncoder(nn.Module):
    """Scores C answers to a question with one Transformer for both; it has no weight besides the Transformer's.

    Args:
        transformer: bidirectional, such as `minilm()`.
        scale: s, the inverse temperature of the softmax over the answers.

    Raises:
        ValueError: a scale that is not above 0.
    """

    def __init__(self, transformer: Transformer, scale: float = 20.0):
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.transformer = transformer
        self.scale = scale

    def forward(
        self, tokens: Int[Tensor, "B texts T"], padding_mask: Bool[Tensor, "B texts T"]
    ) -> Float[Tensor, "B C"]:
        """The scores (logits) of the answers; of each row's texts the first is the question, then come C answers."""
        texts = self.embeddings(tokens.flatten(0, 1), padding_mask.flatten(0, 1))  # [B (1 + C), d_model]
        question, answers = texts.unflatten(0, (len(tokens), -1)).split([1, tokens.shape[1] - 1], dim=1)
        return self.scale * (question * answers).sum(dim=-1)

    def embeddings(
        self, tokens: Int[Tensor, "N T"], padding_mask: Bool[Tensor, "N T"], n_parts: int = 5
    ) -> Float[Tensor, "N d_model"]:
        """One vector per text, short texts beside short ones: an answer is not padded to the length of a question."""
        order = padding_mask.sum(dim=1).argsort(stable=True)
        parts = [self.embedding(*without_padding(tokens[rows], padding_mask[rows])) for rows in order.chunk(n_parts)]
        return torch.cat(parts)[order.argsort()]

    def embedding(
        self, tokens: Int[Tensor, "N T"], padding_mask: Bool[Tensor, "N T"] | None = None
    ) -> Float[Tensor, "N d_model"]:
        """One vector of length 1 per text."""
        return F.normalize(mean_pool(self.transformer.hidden(tokens, padding_mask), padding_mask), dim=-1)

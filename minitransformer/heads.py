"""Heads: from hidden states to scores.

    LMHead              logits = s E h                             tied to the token embedding, as GPT-2
    UntiedLMHead        logits = s W h
    MaskedLMHead        logits = E norm(act(W h + b)) + c          BERT's, also tied
    SequenceClassifier  scores = W dropout(h_first or h_mean) + b  a Transformer with a fresh head on top

Sources: Press & Wolf 2017 (tied embeddings); Devlin et al. 2019, section 3.1 and appendix A.2 (masked language model);
the pooled classification input is BERT's first token or, as sentence encoders do, the mean over real tokens.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from minitransformer.embedding import Real, Tokens
from minitransformer.feedforward import activate
from minitransformer.initialization import initialize
from minitransformer.norm import norm_of
from minitransformer.quantized_layer import QuantizedEmbedding
from minitransformer.randomness import random_state_restored

Rows = Float[Tensor, "*rows d_model"]


class LMHead(nn.Module):
    """Scores every word by its embedding: the table of these is handed in, so it stays tied."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.logit_scale = config.logit_scale

    def forward(self, hidden: Rows, table: nn.Embedding) -> Float[Tensor, "*rows V"]:
        """logits = logit_scale * E h."""
        quantised = isinstance(table, QuantizedEmbedding)
        return self.scaled(table.scores(hidden) if quantised else F.linear(hidden, table.weight))

    def scaled(self, logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        """logit_scale * logits."""
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale  # a walk over V numbers for each token


class UntiedLMHead(LMHead):
    """Scores every word by a `weight` of its own, [V, d_model], as the larger models of the Llama family."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.d_model))

    def forward(self, hidden: Rows, table: nn.Embedding) -> Float[Tensor, "*rows V"]:
        """logits = logit_scale * W h."""
        return self.scaled(F.linear(hidden, self.weight))


class MaskedLMHead(nn.Module):
    """BERT's head: dense layer, activation and norm before the tied product, and a bias per word."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = config.activation
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = norm_of(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Rows, table: nn.Embedding) -> Float[Tensor, "*rows V"]:
        """logits = E norm(act(W h + b)) + c."""
        return F.linear(self.norm(activate(self.dense(hidden), self.activation)), table.weight, self.bias)


class SequenceClassifier(nn.Module):
    """A Transformer with a classification head, on its device: one score per class for a whole row.

    `pool="mean"` averages the hidden states of the real tokens; `pool="first"` takes that of the first real token.
    """

    def __init__(self, transformer: nn.Module, n_classes: int, pool: str = "mean", dropout: float = 0.0, seed: int = 0):
        super().__init__()
        if pool not in ("mean", "first"):
            raise ValueError(f'pool={pool!r} is unknown; choose "mean" or "first"')
        if n_classes < 2 or not 0.0 <= dropout < 1.0:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}, and dropout in [0, 1), got {dropout}")
        self.transformer, self.pool, self.dropout = transformer, pool, dropout
        device = next(transformer.parameters()).device
        with random_state_restored(device):  # PyTorch's own draw is overwritten below
            self.head = nn.Linear(transformer.config.d_model, n_classes, device=device)
        initialize(self.head, "gpt2", n_layers=1, seed=seed)

    def forward(self, tokens: Tokens, padding_mask: Real = None) -> Float[Tensor, "B n_classes"]:
        """Class scores (logits), one row per text."""
        return self.head(F.dropout(self.features(tokens, padding_mask), self.dropout, self.training))

    def features(self, tokens: Tokens, padding_mask: Real = None) -> Float[Tensor, "B d_model"]:
        """What the head reads: one pooled hidden state per text."""
        hidden = self.transformer.hidden(tokens, padding_mask)
        return mean_pool(hidden, padding_mask) if self.pool == "mean" else first_real(hidden, padding_mask)


def mean_pool(hidden: Float[Tensor, "B T d_model"], padding_mask: Real = None) -> Float[Tensor, "B d_model"]:
    """The mean of the hidden states over real tokens."""
    if padding_mask is None:
        return hidden.mean(dim=1)
    real = padding_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
    return (hidden * real).sum(dim=1) / real.sum(dim=1)


def first_real(hidden: Float[Tensor, "B T d_model"], padding_mask: Real = None) -> Float[Tensor, "B d_model"]:
    """The hidden state of the first real token (BERT's [CLS])."""
    return hidden[:, 0] if padding_mask is None else picked(hidden, padding_mask.long().argmax(dim=1))[:, 0]


def picked(x: Float[Tensor, "B T d"], position: Int[Tensor, "B"]) -> Float[Tensor, "B 1 d"]:
    """One position of each row."""
    return x[torch.arange(len(x), device=x.device), position][:, None]

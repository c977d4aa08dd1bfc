"""The position-wise feed-forward network: the same two-layer perceptron at every token.

Source: Vaswani et al. 2017, section 3.3, equation 2.

    FFN(x) = W_down act(W_up x + b_up) + b_down
    FFN(x) = W_down (act(W_gate x) ⊙ W_up x)              gated (Shazeer 2020, equation 6); with "silu" it is SwiGLU

Shapes: x [B, T, d_model] -> hidden [B, T, d_ff] -> [B, T, d_model].

Differs from the paper: the activation may be GELU (Hendrycks & Gimpel 2016), as in BERT and GPT-2, instead of ReLU.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import ACTIVATIONS, TransformerConfig


def activate(x: Float[Tensor, "*shape"], activation: str) -> Float[Tensor, "*shape"]:
    """Apply "gelu" (x Phi(x), exact), "gelu_tanh" (GPT-2's approximation of it), "relu" or "silu" (x sigmoid(x))."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    return F.gelu(x, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(x)


class FeedForward(nn.Module):
    """Weights: `up` [d_ff, d_model] and `down` [d_model, d_ff], with biases where `config.bias` says so."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.d_model, config.d_ff, config.has_bias("up"))
        self.down = nn.Linear(config.d_ff, config.d_model, config.has_bias("down"))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def forward(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T d_model"]:
        """W_down act(W_up x + b_up) + b_down."""
        return self.down(activate(self.up(x), self.activation))


class GatedFeedForward(FeedForward):
    """Weights: also `gate` [d_ff, d_model], which says how much of each hidden number passes. Shazeer 2020."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.gate = nn.Linear(config.d_model, config.d_ff, config.has_bias("gate"))

    def forward(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T d_model"]:
        """W_down (act(W_gate x) ⊙ W_up x)."""
        return self.down(activate(self.gate(x), self.activation) * self.up(x))

"""The shape of a Transformer, as one frozen record.

The letters used for axes everywhere in this repository:

    B  rows in a batch          T  tokens of a row (queries)     S  keys a query may see
    H  heads (n_heads)          d_head = d_model / n_heads       V  words (vocab_size)
"""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
CHOICES = {
    "norm": ("pre", "post"),
    "activation": ACTIVATIONS,
    "lm_head": ("tied", "bert", "none"),
    "attention": ("fused", "written_out"),
    "init": ("gpt2", "unit_embedding"),
}
KINDS = {int: (Integral, "an integer"), float: (Real, "a finite number"), bool: (bool, "True or False")}


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that fixes a Transformer's shape and arithmetic; weights are not in it.

    Raises:
        ValueError: a field of another type or out of its range, heads that do not divide d_model, an unknown choice,
            or a logit_scale that BERT's head would ignore.
    """

    vocab_size: int  # V
    max_len: int  # rows of the position table: the longest sequence that can be read
    d_model: int = 128  # width of the residual stream
    n_heads: int = 4
    n_layers: int = 4
    d_ff: int = 512  # hidden width of the feed-forward network
    dropout: float = 0.0  # on embeddings, attention weights and sublayer outputs, in training only
    causal: bool = True  # True: decoder (GPT), each token sees itself and the past; False: encoder (BERT)
    norm: str = "pre"  # "pre": x + f(norm(x)), as GPT-2;  "post": norm(x + f(x)), as Vaswani et al. 2017 and BERT
    activation: str = "gelu"  # "gelu" (erf) | "gelu_tanh" (GPT-2's approximation) | "relu"
    norm_eps: float = 1e-5  # added to the variance inside LayerNorm; BERT's checkpoints use 1e-12
    n_segments: int = 0  # BERT's token types: 0 means no segment table
    embedding_norm: bool = False  # BERT normalises the sum of its embeddings
    lm_head: str = "tied"  # "tied": E h;  "bert": BERT's transform before the tied product;  "none": hidden states only
    logit_scale: float = 1.0  # logits are multiplied by it: 1/sqrt(d_model) suits embeddings of unit variance
    attention: str = "fused"  # "fused": PyTorch's kernel;  "written_out": the formula, line by line
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more time
    init: str = "gpt2"  # how fresh weights are drawn, see minitransformer/initialization.py

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name), field.type))
        for name in ("vocab_size", "max_len", "d_model", "n_heads", "n_layers", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        d, heads, eps, scale = self.d_model, self.n_heads, self.norm_eps, self.logit_scale
        cure = "choose d_model as a multiple of n_heads"
        fits = {
            f"d_model={d} does not divide into n_heads={heads} heads; {cure}": d % heads == 0,
            f"n_segments must be 0 (no segment table) or more, got {self.n_segments}": self.n_segments >= 0,
            f"dropout is a probability in [0, 1), got {self.dropout}": 0.0 <= self.dropout < 1.0,
            f"norm_eps and logit_scale must be above 0, got {eps} and {scale}": eps > 0.0 and scale > 0.0,
            f'lm_head="bert" has no logit_scale, got {scale}; leave it at 1.0': self.lm_head != "bert" or scale == 1.0,
        }
        for message in [message for message, holds in fits.items() if not holds]:
            raise ValueError(message)

    @property
    def d_head(self) -> int:
        """Width of one head: d_model / n_heads."""
        return self.d_model // self.n_heads


def _checked(name: str, value, kind: type):
    """The value as Python's own number (of NumPy's, too), flag or choice; ValueError if it is of another kind."""
    if kind is str:
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(CHOICES[name])}")
        return value
    known, called = KINDS[kind]
    if not isinstance(value, known) or isinstance(value, bool) != (kind is bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be {called}, got {value!r}")
    return kind(value)

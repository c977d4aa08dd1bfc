"""The shape of a Transformer, as one frozen record.

The letters used for axes everywhere in this repository:

    B  rows in a batch          T  tokens of a row (queries)     S  keys a query may see
    H  heads (n_heads)          H_kv  of keys and values         V  words (vocab_size)
    d_head  width of a head: d_model / n_heads, unless head_dim says another
"""

import math
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Integral, Real

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
CHOICES = {
    "norm": ("pre", "post"),
    "activation": ACTIVATIONS,
    "lm_head": ("tied", "untied", "bert", "none"),
    "attention": ("fused", "written_out"),
    "init": ("gpt2", "unit_embedding"),
    "position": ("learned", "rotary"),
    "norm_type": ("layer", "rms"),
    "bias": ("all", "none", "query+key+value", "query+key+value+output", "gate+up+down"),
}
KINDS = {int: (Integral, "an integer"), float: (Real, "a finite number"), bool: (bool, "True or False")}


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that fixes a Transformer's shape and arithmetic; weights are not in it.

    Raises:
        ValueError: a field of another type or out of its range, heads that do not divide d_model, or heads of keys and
            values that do not divide these, an unknown choice, or an option that would be ignored.
    """

    vocab_size: int  # V
    max_len: int  # the longest sequence that can be read: rows of the position table, if there is one
    d_model: int = 128  # width of the residual stream
    n_heads: int = 4
    n_layers: int = 4
    d_ff: int = 512  # hidden width of the feed-forward network
    dropout: float = 0.0  # on embeddings, attention weights and sublayer outputs, in training only
    causal: bool = True  # True: decoder (GPT), each token sees itself and the past; False: encoder (BERT)
    norm: str = "pre"  # "pre": x + f(norm(x)), as GPT-2;  "post": norm(x + f(x)), as Vaswani et al. 2017 and BERT
    activation: str = "gelu"  # "gelu" (erf) | "gelu_tanh" (GPT-2's approximation) | "relu" | "silu"
    norm_eps: float = 1e-5  # added under the root inside a norm; BERT's checkpoints use 1e-12
    n_segments: int = 0  # BERT's token types: 0 means no segment table
    embedding_norm: bool = False  # BERT normalises the sum of its embeddings
    lm_head: str = "tied"  # "tied": E h;  "untied": W h;  "bert": BERT's transform before E h;  "none": hidden states
    logit_scale: float = 1.0  # logits are multiplied by it: 1/sqrt(d_model) suits embeddings of unit variance
    attention: str = "fused"  # "fused": PyTorch's kernel;  "written_out": the formula, line by line
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more time
    init: str = "gpt2"  # how fresh weights are drawn, see minitransformer/initialization.py

    _: KW_ONLY  # what the Llama family has
    position: str = "learned"  # "learned": a table;  "rotary": queries and keys are turned (Su et al. 2021)
    rope_theta: float = 10_000.0  # base of the rotary angles
    norm_type: str = "layer"  # "layer": LayerNorm;  "rms": RMSNorm (Zhang & Sennrich 2019)
    gated: bool = False  # the FFN's hidden layer is a product of two, with "silu" SwiGLU (Shazeer 2020)
    n_kv_heads: int = 0  # heads of keys and values, each for several of queries (Ainslie et al. 2023); 0: n_heads
    head_dim: int = 0  # width of one head; 0: d_model / n_heads
    bias: str = "all"  # linear layers of a block that have one: "all", "none" or their names, such as "gate+up+down"

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name), field.type))
        for name in ("vocab_size", "max_len", "d_model", "n_heads", "n_layers", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.head_dim and self.d_model % self.n_heads:
            cure = "choose d_model as a multiple of n_heads"
            raise ValueError(f"d_model={self.d_model} does not divide into n_heads={self.n_heads} heads; {cure}")
        if self.n_kv_heads < 0 or self.n_heads % (self.n_kv_heads or 1):
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads} (or be 0: as many)")
        if self.head_dim < 0 or (self.position == "rotary" and self.d_head % 2):
            raise ValueError(f"a head must have a width, and an even one for rotary positions, got {self.d_head}")
        if self.rope_theta <= 0.0 or (self.position != "rotary" and self.rope_theta != 10_000.0):
            raise ValueError(f'rope_theta={self.rope_theta} goes with position="rotary", and must be above 0')
        if self.n_segments < 0:
            raise ValueError(f"n_segments must be 0 (no segment table) or more, got {self.n_segments}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")
        if self.norm_eps <= 0.0 or self.logit_scale <= 0.0:
            raise ValueError(f"norm_eps and logit_scale must be above 0, got {self.norm_eps} and {self.logit_scale}")
        if self.lm_head in ("bert", "none") and self.logit_scale != 1.0:
            raise ValueError(f'lm_head="{self.lm_head}" has no logit_scale, got {self.logit_scale}; leave it at 1.0')

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def d_kv(self) -> int:
        """Width of a token's keys, all heads side by side, and of its values."""
        return (self.n_kv_heads or self.n_heads) * self.d_head

    def has_bias(self, layer: str) -> bool:
        """Whether the linear layer of that name ("query", …, "down") has a bias."""
        return self.bias == "all" or layer in self.bias.split("+")


def check_whole(name: str, value, least: int, below: float | int = math.inf) -> None:
    """Raise ValueError unless the value is a whole number, at least the one and below the other."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value < below:
        most = "" if below == math.inf else f" and at most {below - 1}"
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}{most}")


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

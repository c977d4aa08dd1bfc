"""The KV cache: what a causal model need not compute again when the text grows by one token.

A key and a value depend on the past only, so those of earlier tokens stay as they are. Generation keeps them: each new
token then costs one query instead of a pass over the whole text.

Shapes: per layer, key and value [B, H, S, d_head]; which of the S positions hold real tokens, [B, S].
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class LayerCache:
    """The keys and values that one attention layer has computed so far."""

    def __init__(self):
        self.key: Tensor | None = None  # [B, H, S, d_head]
        self.value: Tensor | None = None

    def append(self, key: Float[Tensor, "B H T d_head"], value: Float[Tensor, "B H T d_head"]) -> None:
        """Put the newest T keys and values behind those already there."""
        self.key = key if self.key is None else torch.cat([self.key, key], dim=2)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=2)


class KVCache:
    """One `LayerCache` per block, and what all blocks share about the positions seen so far."""

    def __init__(self, n_layers: int):
        self.layers = [LayerCache() for _ in range(n_layers)]
        self.real_keys: Bool[Tensor, "B S"] | None = None
        self.n_tokens: Int[Tensor, B] | None = None  # real tokens of each row: the next position to hand out

    @property
    def is_empty(self) -> bool:
        """True before the first tokens went in."""
        return self.real_keys is None

    def extend(self, real: Bool[Tensor, "B T"]) -> Bool[Tensor, "B S"]:
        """Note which of the newest T positions are real; returns that for all S positions so far."""
        self.real_keys = real if self.real_keys is None else torch.cat([self.real_keys, real], dim=1)
        return self.real_keys

    def count(self, real_tokens: Bool[Tensor, "B T"]) -> None:
        """Note how many real tokens each row has gained."""
        gained = real_tokens.sum(dim=1)
        self.n_tokens = gained if self.n_tokens is None else self.n_tokens + gained

"""The KV cache: what a causal model need not compute again when the text grows by one token.

A key and a value depend on the past only, so those of earlier tokens stay as they are. Generation keeps them: each new
token then costs one query instead of a pass over the whole text.

Shapes: per layer, key and value [B, H_kv, S, d_head]; which of the S positions hold real tokens, [B, S].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitransformer.attention import Context, Mask


class LayerCache(Context):
    """The keys and values that one attention layer has computed so far: a context for the tokens that come next."""

    def __init__(self):
        self.key: Float[Tensor, "B H_kv S d_head"] | None = None
        self.value: Float[Tensor, "B H_kv S d_head"] | None = None

    def append(self, key: Float[Tensor, "B H_kv T d_head"], value: Float[Tensor, "B H_kv T d_head"]) -> None:
        """Put the newest T keys and values behind those already there."""
        self.key = key if self.key is None else torch.cat([self.key, key], dim=2)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=2)

    def attend(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attention over all tokens so far, the newest included; their keys and values are kept."""
        self.append(k, v)
        return attention(q, self.key, self.value, mask)


class KVCache:
    """One `LayerCache` per block, and what all blocks share about the positions seen so far."""

    def __init__(self, n_layers: int):
        self.layers = [LayerCache() for _ in range(n_layers)]
        self.n_keys = 0  # S, padding included
        self.real_keys: Bool[Tensor, "B S"] | None = None  # None while there is no padding
        self.n_tokens: Int[Tensor, B] | int = 0  # real tokens of each row: the next position to hand out

    @property
    def is_empty(self) -> bool:
        """True before the first tokens went in."""
        return self.n_keys == 0

    def check(self, n_rows: int, n_layers: int) -> None:
        """Raise ValueError unless it is of a model of so many layers, and of so many rows if it holds any."""
        rows = {len(layer.key) for layer in self.layers if layer.key is not None}
        if len(self.layers) != n_layers or not rows <= {n_rows}:
            held = f"{rows.pop()} rows" if rows else "no rows yet"
            raise ValueError(
                f"the cache has {len(self.layers)} layers and {held}, the model {n_layers} layers, and there are "
                f"{n_rows} rows of tokens; begin each batch with KVCache(n_layers) of its own, or let it keep(rows)"
            )

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Forget all rows but these."""
        for layer in self.layers:
            if layer.key is not None:
                layer.key, layer.value = layer.key[rows], layer.value[rows]
        self.real_keys = None if self.real_keys is None else self.real_keys[rows]
        self.n_tokens = self.n_tokens[rows] if isinstance(self.n_tokens, Tensor) else self.n_tokens

    def extend(self, n_new: int, real: Bool[Tensor, "B T"] | None) -> Bool[Tensor, "B S"] | None:
        """Note which of the newest T positions are real (None: all of them); returns that for all S so far."""
        before, self.n_keys = self.n_keys, self.n_keys + n_new
        if self.real_keys is not None:
            newest = self.real_keys.new_ones(len(self.real_keys), n_new) if real is None else real
            self.real_keys = torch.cat([self.real_keys, newest], dim=1)
        elif real is not None:
            self.real_keys = F.pad(real, (before, 0), value=True)
        return self.real_keys

    def count(self, n_new: int, real: Bool[Tensor, "B T"] | None) -> None:
        """Note how many real tokens each row has gained among the newest T (None: all of them are real)."""
        self.n_tokens = self.n_tokens + (n_new if real is None else real.sum(dim=1))

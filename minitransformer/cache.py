"""The KV cache: what a causal model need not compute again when the text grows by one token.

A key and a value depend on the past only, so those of earlier tokens stay as they are. Generation keeps them: each new
token then costs one query instead of a pass over the whole text.

Shapes: per layer, key and value [B, H, S, d_head]; which of the S positions hold real tokens, [B, S].
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Growing:
    """A tensor [B, H, S, d_head] that grows along S.

    Room is made for twice as many positions at a time: each one is then copied a few times in all, and not at every
    step. Under autograd, which must see every version, the pieces are joined instead.
    """

    def __init__(self):
        self.room: Float[Tensor, "B H more d_head"] | None = None
        self.used = 0

    def append(self, new: Float[Tensor, "B H T d_head"]) -> None:
        """Put T positions behind those already there."""
        before, self.used = self.used, self.used + new.shape[2]
        if self.room is None:
            self.room = new
        elif new.requires_grad or self.room.requires_grad:
            self.room = torch.cat([self.room[:, :, :before], new], dim=2)
        else:
            if self.used > self.room.shape[2]:
                larger = new.new_empty(*new.shape[:2], 2 * self.used, new.shape[3])
                larger[:, :, :before] = self.room[:, :, :before]
                self.room = larger
            self.room[:, :, before : self.used] = new

    def seen(self) -> Float[Tensor, "B H S d_head"] | None:
        """All S positions, without the spare room; None before the first."""
        return None if self.room is None else self.room[:, :, : self.used]


class LayerCache:
    """The keys and values that one attention layer has computed so far."""

    def __init__(self):
        self.keys, self.values = Growing(), Growing()

    @property
    def key(self) -> Float[Tensor, "B H S d_head"] | None:
        """The keys so far."""
        return self.keys.seen()

    @property
    def value(self) -> Float[Tensor, "B H S d_head"] | None:
        """The values so far."""
        return self.values.seen()

    def append(self, key: Float[Tensor, "B H T d_head"], value: Float[Tensor, "B H T d_head"]) -> None:
        """Put the newest T keys and values behind those already there."""
        self.keys.append(key)
        self.values.append(value)


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

    def extend(self, n_new: int, real: Bool[Tensor, "B T"] | None) -> Bool[Tensor, "B S"] | None:
        """Note which of the newest T positions are real (None: all of them); returns that for all S so far."""
        before, self.n_keys = self.n_keys, self.n_keys + n_new
        if real is None and self.real_keys is None:
            return None
        known = self.real_keys if real is None else real
        earlier = known.new_ones(len(known), before) if self.real_keys is None else self.real_keys
        newest = known.new_ones(len(known), n_new) if real is None else real
        self.real_keys = torch.cat([earlier, newest], dim=1)
        return self.real_keys

    def count(self, n_new: int, real: Bool[Tensor, "B T"] | None) -> None:
        """Note how many real tokens each row has gained among the newest T (None: all of them are real)."""
        self.n_tokens = self.n_tokens + (n_new if real is None else real.sum(dim=1))

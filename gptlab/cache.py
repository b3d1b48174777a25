"""Keys and values of the tokens already seen, so that generating a token costs one token.

Shapes: B batch, K key/value heads, T new tokens, S tokens held, E head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, in memory laid out once."""

    last: Tensor  # for an attention that mixes tokens with the one before: what it keeps of the newest, (B, 1, D)

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str):
        self.shape, self.settings = shape, {"dtype": dtype, "device": device}
        self.length = 0

    def lay_out(self, heads: int) -> None:
        """Take the memory, once it is known how many of the K heads are here: a rank may hold only some."""
        B, _, S, E = self.shape
        # zeros: a masked value weighs nothing, unless memory that was never written says NaN
        self.keys = torch.zeros(B, heads, S, E, **self.settings)
        self.values = torch.zeros(B, heads, S, E, **self.settings)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, T, E); return all held so far, (B, K, S, E)."""
        end = self.length + keys.shape[2]
        if end > self.shape[2]:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.shape[2]}")
        if not hasattr(self, "keys"):
            self.lay_out(keys.shape[1])
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def row(self, number: int) -> "LayerCache":
        """One sequence of the B, in the same memory, with a length of its own."""
        one = LayerCache((1, *self.shape[1:]), **self.settings)
        one.keys, one.values = self.keys[number : number + 1], self.values[number : number + 1]
        return one


class KVCache:
    """The caches of all layers of a `GPT` with this config, for `batch` sequences of up to `capacity` tokens."""

    mask: Tensor | None = None  # where the sequences differ in length: which keys each may look at

    def __init__(self, config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        shape = (batch, config.kv_heads, capacity, config.head_width)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length

    def clear(self) -> None:
        for layer in self.layers:
            layer.length = 0

    def rows(self) -> list["KVCache"]:
        """Each of the `batch` sequences by itself, in the same memory."""
        for layer in self.layers:
            layer.lay_out(layer.shape[1])
        rows = []
        for number in range(self.layers[0].shape[0]):
            row = object.__new__(KVCache)
            row.layers = [layer.row(number) for layer in self.layers]
            rows.append(row)
        return rows

    def wipe(self) -> None:
        """Overwrite what is not held: a NaN there would reach sequences that are computed together with this one."""
        for layer in self.layers:
            if hasattr(layer, "keys"):
                layer.keys[:, :, layer.length :] = layer.values[:, :, layer.length :] = 0

    def copy_from(self, other: "KVCache") -> None:
        """Hold what `other`, of the same shape, holds."""
        for own, theirs in zip(self.layers, other.layers, strict=True):
            own.length = theirs.length
            if not hasattr(own, "keys"):
                own.lay_out(theirs.keys.shape[1])
            if hasattr(theirs, "last"):
                own.last = theirs.last.clone()
            own.keys[:, :, : own.length] = theirs.keys[:, :, : own.length]
            own.values[:, :, : own.length] = theirs.values[:, :, : own.length]


class Together:
    """One new token for each of the first `len(lengths)` sequences of `cache`, which hold so many tokens each.

    The caches of single rows are not told: that they have grown is to be said to them afterwards.
    """

    def __init__(self, cache: KVCache, lengths: Sequence[int]):
        device = cache.layers[0].keys.device
        self.length = max(lengths)
        self.places = torch.tensor(lengths, device=device)
        self.mask = (torch.arange(self.length + 1, device=device) <= self.places[:, None])[:, None, None]
        self.layers = [TogetherLayer(layer, self) for layer in cache.layers]

    @property
    def positions(self) -> Tensor:
        """Of the new tokens, (B, 1)."""
        return self.places[:, None]


class TogetherLayer:
    def __init__(self, layer: LayerCache, together: Together):
        self.keys, self.values, self.together = layer.keys, layer.values, together

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, K, 1, E) behind those of their sequences; return all, (B, K, S, E)."""
        B, places = len(keys), self.together.places
        rows, S = torch.arange(B, device=keys.device), self.together.mask.shape[-1]
        self.keys[rows, :, places] = keys[:, :, 0]
        self.values[rows, :, places] = values[:, :, 0]
        return self.keys[:B, :, :S], self.values[:B, :, :S]

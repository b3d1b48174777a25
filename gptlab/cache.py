"""Keys and values of the tokens already seen, so that generating a token costs one token.

Shapes: B batch, K key/value heads, T new tokens, S tokens held, E head width.
"""

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, in memory laid out once."""

    last: Tensor  # for an attention that mixes tokens with the one before: what it keeps of the newest, (B, 1, D)

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str):
        self.shape, self.settings = shape, {"dtype": dtype, "device": device}
        self.length = 0

    def _lay_out(self, heads: int) -> None:
        """Take the memory, once it is known how many of the K heads are here: a rank may hold only some."""
        B, _, S, E = self.shape
        self.keys = torch.empty(B, heads, S, E, **self.settings)
        self.values = torch.empty(B, heads, S, E, **self.settings)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, T, E); return all held so far, (B, K, S, E)."""
        end = self.length + keys.shape[2]
        if end > self.shape[2]:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.shape[2]}")
        if not hasattr(self, "keys"):
            self._lay_out(keys.shape[1])
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """The caches of all layers of a `GPT` with this config, for `batch` sequences of up to `capacity` tokens."""

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

"""Attention that looks back over a fixed number of tokens: what one changed class looks like."""

import torch
from torch import Tensor

from gptlab.cache import LayerCache
from gptlab.model import Attention

WINDOW = 32  # tokens that a query sees, itself included


class SlidingWindowAttention(Attention):
    """Causal attention over the last WINDOW tokens in all layers but the last, which sees all (Beltagy et al. 2020)."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.is_local = layer < config.n_layer - 1

    def forward(self, x: Tensor, rotary: Tensor | None, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        if self.is_local:
            T, start = x.shape[1], 0 if cache is None else cache.length
            queries = torch.arange(start, start + T, device=x.device)[:, None]
            distance = queries - torch.arange(start + T, device=x.device)
            near = ((distance >= 0) & (distance < WINDOW))[None, None]
            mask = near if mask is None else near & mask
        return super().forward(x, rotary, mask, cache)

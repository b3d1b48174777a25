"""Attention of tokens that know the one before them: a token shift."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.cache import LayerCache
from gptlab.model import Attention


class ShiftedAttention(Attention):
    """What queries, keys and values are made of is, channel by channel, a learned mixture of this token and the last.

    It is the token shift of RWKV (Peng et al. 2023, section 3.1) before an ordinary attention: a head finds what
    followed an earlier pair of tokens without spending a layer on putting the pair together. Half of each to begin
    with; D parameters a layer.
    """

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.shift = nn.Parameter(torch.full((config.n_embd,), 0.5))

    def forward(self, x: Tensor, rotary: Tensor | None, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        start = 0 if cache is None else cache.length
        before = torch.cat((cache.last if start else torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        if cache is not None:
            cache.last = x[:, -1:]
        if mask is not None:  # the first token of a document has none before it
            linked = mask[:, 0].diagonal(start - 1, dim1=-2, dim2=-1)
            before = before * F.pad(linked, (x.shape[1] - linked.shape[1], 0))[..., None]
        return super().forward(x + self.shift.to(x.dtype) * (before - x), rotary, mask, cache)

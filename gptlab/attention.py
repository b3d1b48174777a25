"""softmax(q k^T / sqrt(E)) v, by what is fastest where it runs; all ways are equal in tests, but for rounding.

Shapes: B batch, H heads, K key/value heads, T queries, S keys, E head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptlab.formulas import compiled_for_cpu, wide

# Up to so many tokens a CPU's own matrix products, with a compiled softmax between them, beat the kernel that never
# holds the scores (benchmarks/attention.py); beyond, its memory is the lesser evil.
PRODUCTS_UP_TO = 1024
# To be read: a kernel would compute them for every score, which takes as long as the softmax; as wide as the scores.
POSITIONS = torch.arange(2**15, dtype=torch.float32, device="cpu")
HAS_TILES = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # of bf16 matrices


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """(B, H, T, E) of queries (B, H, T, E), keys and values (B, K, S, E).

    `mask` (B or 1, 1, T, S) is true where a query may look. With `causal`, T is S, and each sees itself and what is
    before it.
    """
    if causal and mask is None and compiled_for_cpu(q) and q.size(2) <= PRODUCTS_UP_TO:
        return products(q, k, v, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=q.size(1) != k.size(1)
    )


def products(q: Tensor, k: Tensor, v: Tensor, dropout: float, block: int | None = None) -> Tensor:
    """Causal attention of T queries to T keys on a CPU, by matrix products in the type of `q`; its softmax is float32.

    `block` queries at a time: no scores are computed for the keys behind the last of them. Fewer leave out more, and
    take more calls, which cost more than that where the processor multiplies tiles.
    """
    if block is None:
        block = 256 if HAS_TILES and q.dtype == torch.bfloat16 else 64
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    return Products.apply(q, k, v, dropout, block)


class Products(torch.autograd.Function):
    """The exponentials of the scores are computed once, and all that is kept of them, in the type of the products: what
    they are divided by, their sum, waits until after the second product (Dao et al. 2022).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float, block: int) -> Tensor:
        T, scale = q.size(2), q.size(3) ** -0.5
        rows, kept = [], []
        assert len(POSITIONS) >= T
        for start in range(0, T, block):
            stop = min(start + block, T)
            keys, values = (x[:, :, :stop].contiguous() for x in (k, v))  # a product copies them too, and slower
            scores = wide(q[:, :, start:stop] @ keys.mT) * scale
            ahead = POSITIONS[:stop] > POSITIONS[start:stop, None]
            scores = scores.masked_fill(ahead, -torch.inf)
            powers = (scores - scores.amax(dim=-1, keepdim=True)).exp()
            total = powers.masked_fill(ahead, 0).sum(dim=-1, keepdim=True)  # zeros anyhow, but so in the same loop
            powers = powers.to(v.dtype)
            counted = F.dropout(powers, dropout)
            rows.append((wide(counted @ values) / total).to(v.dtype))
            kept += [total, powers, counted]
        ctx.block = block
        ctx.save_for_backward(q, k, v, *kept)
        return torch.cat(rows, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        T, scale, block = q.size(2), q.size(3) ** -0.5, ctx.block
        blocks = math.ceil(T / block)
        d_q, d_k, d_v = [], [0] * blocks, [0] * blocks
        for number, start in enumerate(range(0, T, block)):
            stop = min(start + block, T)
            total, powers, counted = kept[3 * number : 3 * number + 3]
            keys, values = k[:, :, :stop], v[:, :, :stop]  # copied here, they would be kept since the forward pass
            d_y = gradient[:, :, start:stop]
            d_weights = wide(counted) * wide(d_y @ values.mT)
            common = d_weights.sum(dim=-1, keepdim=True) / total  # or (d_y * y).sum(), but y is rounded
            d_scores = ((d_weights - wide(powers) * common) * (scale / total)).to(q.dtype)
            d_q.append(d_scores @ keys)
            d_keys = (d_scores.mT @ q[:, :, start:stop]).split(block, dim=2)
            d_values = (counted.mT @ (wide(d_y) / total).to(v.dtype)).split(block, dim=2)
            for behind in range(number + 1):
                d_k[behind] = d_k[behind] + d_keys[behind]
                d_v[behind] = d_v[behind] + d_values[behind]
        return *(torch.cat(parts, dim=2) for parts in (d_q, d_k, d_v)), None, None

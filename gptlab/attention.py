"""softmax(q k^T / sqrt(E)) v, by what is fastest where it runs; all ways are equal in tests, but for rounding.

Shapes: B batch, H heads, K key/value heads, T queries, S keys, E head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to so many tokens a CPU's own matrix products, with a compiled softmax between them, beat the kernel that never
# holds the scores (benchmarks/attention.py); beyond, its memory is the lesser evil.
PRODUCTS_UP_TO = 1024
BLOCK = 64  # queries at a time


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """(B, H, T, E) of queries (B, H, T, E), keys and values (B, K, S, E).

    `mask` (B or 1, 1, T, S) is true where a query may look. With `causal`, T is S, and each sees itself and what is
    before it.
    """
    if causal and mask is None and by_products(q):
        return products(q, k, v, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=q.size(1) != k.size(1)
    )


def by_products(q: Tensor) -> bool:
    """Whether matrix products are the faster way: where a compiler joins all that is between them into one pass."""
    return torch.compiler.is_compiling() and q.device.type == "cpu" and q.size(2) <= PRODUCTS_UP_TO


def products(q: Tensor, k: Tensor, v: Tensor, dropout: float, block: int = BLOCK) -> Tensor:
    """Causal attention of T queries to T keys, by matrix products in the type of `q` and a softmax in float32.

    `block` queries at a time: no scores are computed for the keys behind the last of them.
    """
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    T, scale, rows = q.size(2), q.size(3) ** -0.5, []
    wide = torch.promote_types(q.dtype, torch.float32)
    for start in range(0, T, block):
        stop = min(start + block, T)
        scores = (q[:, :, start:stop] @ k[:, :, :stop].mT).to(wide) * scale
        ahead = torch.arange(stop, device=q.device) > torch.arange(start, stop, device=q.device)[:, None]
        weights = scores.masked_fill(ahead, -torch.inf).softmax(dim=-1).to(v.dtype)
        rows.append(F.dropout(weights, dropout) @ v[:, :, :stop])
    return torch.cat(rows, dim=2)

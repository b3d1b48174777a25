"""Losses: pure functions of tensors. Shapes: B batch, T time, N tokens, D model width, V vocabulary."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**25  # 128 MiB in float32; a vocabulary of 50,000 takes 671 tokens at a time


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats of every token, (B, T), in float32 whatever the type of `logits` (B, T, V)."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets)


def masked_sum(values: Tensor, loss_mask: Tensor) -> Tensor:
    """The sum of the values (B, T) that `loss_mask` (B, T) keeps."""
    return torch.where(loss_mask, values, 0.0).sum()


class SummedNLL(torch.autograd.Function):
    """The sum of -log p(target) over the tokens that a mask keeps, of logits that are never held whole.

    A chunk's gradient is found while its logits are there, so that nothing is computed twice; the backward pass only
    scales it (Hsu et al. 2024, section 3.2). Logits are multiplied in autocast's type, and their softmax is float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, loss_mask: Tensor, vocab_size: int
    ) -> Tensor:
        """Of hidden (N, D), weight (V or more, D), targets (N,) and loss_mask (N,)."""
        total, d_hidden, d_weight = torch.zeros((), device=hidden.device), [], None
        for rows, x, w, logits in logit_chunks(hidden, weight, vocab_size):
            target, keep = targets[rows, None], loss_mask[rows, None]
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            total = total + torch.where(keep, log_sum - logits.gather(1, target), 0.0).sum()
            hit = torch.arange(logits.shape[1], device=logits.device) == target
            gradient = torch.where(keep, (logits - log_sum).exp() - hit.float(), 0.0).to(w.dtype)
            d_hidden.append(gradient @ w)
            part = (gradient.mT @ x).to(weight.dtype)
            d_weight = part if d_weight is None else d_weight + part
        ctx.save_for_backward(torch.cat(d_hidden).to(hidden.dtype), d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * gradient, d_weight * gradient, None, None, None


def summed_nll(hidden: Tensor, weight: Tensor, targets: Tensor, loss_mask: Tensor, vocab_size: int) -> Tensor:
    """The sum of -log p(target) in nats over what `loss_mask` keeps, of hidden (B, T, D), the others (B, T)."""
    if targets.numel() * len(weight) <= LOGITS_AT_ONCE:  # the plain way: its compiled code is found again
        return masked_sum(token_nll(F.linear(hidden, weight)[..., :vocab_size], targets), loss_mask)
    return SummedNLL.apply(hidden.flatten(0, 1), weight, targets.flatten(), loss_mask.flatten(), vocab_size)


def logit_chunks(hidden: Tensor, weight: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of hidden (N, D) so many rows at a time that their logits (n, V or more) are no more than `LOGITS_AT_ONCE`:
    which rows, those of `hidden` and all of `weight` as they are multiplied, and the logits in float32.

    Columns from `vocab_size` on, which only fill up the matrix, are -inf: they are never predicted.
    """
    device = hidden.device.type
    computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight = hidden.to(computed_in), weight.to(computed_in)
    filling = torch.arange(len(weight), device=hidden.device) >= vocab_size
    step = max(1, LOGITS_AT_ONCE // len(weight))
    for start in range(0, len(hidden), step):
        rows = slice(start, min(start + step, len(hidden)))
        logits = F.linear(hidden[rows], weight).float()
        yield (
            rows,
            hidden[rows],
            weight,
            logits if vocab_size == len(weight) else logits.masked_fill(filling, -torch.inf),
        )


def scored(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """-log p(target) in nats and the likeliest token, both (B, T), of hidden (B, T, D), where no gradient is wanted."""
    nll, likeliest = [], []
    for rows, _, _, logits in logit_chunks(hidden.flatten(0, 1), weight, vocab_size):
        nll.append(F.cross_entropy(logits, targets.flatten()[rows], reduction="none"))
        likeliest.append(logits.argmax(dim=-1))
    return torch.cat(nll).view_as(targets), torch.cat(likeliest).view_as(targets)


def document_layout(tokens: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """For documents packed one after the other in `tokens` (B, T), each closed by `end_id`: the number of its document
    within the row, and its position within the document, both (B, T)."""
    ends = tokens == end_id
    document_ids = ends.cumsum(dim=1) - ends.long()  # an end token belongs to what it ends
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(ends[:, :-1], index[:, 1:], 0)
    return document_ids, index - starts.cummax(dim=1).values

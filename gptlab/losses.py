"""Losses: pure functions of tensors. Shapes: B batch, T time, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats of every token, (B, T), in float32 whatever the type of `logits` (B, T, V)."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets)


def masked_sum(values: Tensor, loss_mask: Tensor) -> Tensor:
    """The sum of the values (B, T) that `loss_mask` (B, T) keeps."""
    return torch.where(loss_mask, values, 0.0).sum()


def document_layout(tokens: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """For documents packed one after the other in `tokens` (B, T), each closed by `end_id`: the number of its document
    within the row, and its position within the document, both (B, T)."""
    ends = tokens == end_id
    document_ids = ends.cumsum(dim=1) - ends.long()  # an end token belongs to what it ends
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(ends[:, :-1], index[:, 1:], 0)
    return document_ids, index - starts.cummax(dim=1).values

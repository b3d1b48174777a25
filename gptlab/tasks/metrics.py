"""Figures over a whole validation split, the same for any batch size and number of ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from gptlab.scoring import figures, token_sums

SUMS = ("nll", "tokens", "correct", "text_bytes")


class TokenMetrics(Metric):
    """Sums over scored tokens in float64: loss, perplexity, bits per byte of the text scored, and token accuracy.

    `token_bytes` (V,) is the number of bytes of text that each token stands for.
    """

    full_state_update = False

    def __init__(self, token_bytes: Tensor):
        super().__init__()
        self.token_bytes = token_bytes
        for name in SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "TokenMetrics":
        """Go where the task goes, but stay float64: trainer.precision=bf16-true would round the sums to 8 bits."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.dtype != torch.float64:
                return fn(tensor)
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor if device.type == "mps" else tensor.to(device)

        return super()._apply(move, exclude_state)

    def update(self, nll: Tensor, predictions: Tensor, targets: Tensor, loss_mask: Tensor) -> None:
        """Add a batch: nll in nats, predicted and true ids, and which of them count, all (B, T)."""
        # To where the sums are: the device itself, or the CPU for MPS, which has no float64.
        nll, predictions, targets, loss_mask = (x.to(self.nll.device) for x in (nll, predictions, targets, loss_mask))
        self.token_bytes = self.token_bytes.to(targets.device)
        sums = token_sums(nll, predictions, targets, loss_mask, self.token_bytes)
        for name, value in zip(SUMS, sums, strict=True):
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, float]:
        return figures([float(getattr(self, name)) for name in SUMS])

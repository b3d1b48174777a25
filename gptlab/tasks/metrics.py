"""Figures over a whole validation split, the same for any batch size and number of ranks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMetrics(Metric):
    """Sums over scored tokens in float64: loss, perplexity, bits per byte of the text scored, and token accuracy.

    `token_bytes` (V,) is the number of bytes of text that each token stands for.
    """

    full_state_update = False

    def __init__(self, token_bytes: Tensor):
        super().__init__()
        self.token_bytes = token_bytes
        for name in ("nll", "tokens", "correct", "text_bytes"):
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
        keep = loss_mask.double()
        self.nll += (nll.double() * keep).sum()
        self.tokens += keep.sum()
        self.correct += ((predictions == targets) * keep).sum()
        self.text_bytes += (self.token_bytes[targets] * keep).sum()

    def compute(self) -> dict[str, float]:
        nll, tokens = float(self.nll), float(self.tokens)
        loss = nll / tokens if tokens else math.nan
        text_bytes = float(self.text_bytes)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # beyond that float64 overflows
            "bits_per_byte": nll / math.log(2) / text_bytes if text_bytes else math.nan,
            "accuracy": float(self.correct) / tokens if tokens else math.nan,
        }

"""Two levers that are not gptlab's own: a z-loss, and a batch that grows."""

from typing import Any

import torch
from torch import Tensor

from gptlab.losses import masked_sum, token_nll
from gptlab.tasks.lm import LMTask


class ZLoss(LMTask):
    """Adds `weight` times the mean of (log Z)^2, Z the sum of the exponentials of a token's logits (PaLM 2022, 5)."""

    def __init__(self, *args: Any, weight: float, **rest: Any):
        super().__init__(*args, **rest)
        self.weight = weight

    def _loss_and_sums(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(tokens).float()
        nll = masked_sum(token_nll(logits, targets), loss_mask)
        penalty = masked_sum(logits.logsumexp(dim=-1).square(), loss_mask)
        sums = torch.stack((nll.detach(), loss_mask.sum()))
        return (nll + self.weight * penalty) / targets.numel(), sums


class GrowingBatch(LMTask):
    """Learns from half of the windows of each step until step `half_until`, and passes over the others."""

    def __init__(self, *args: Any, half_until: int, **rest: Any):
        super().__init__(*args, **rest)
        self.half_until = half_until

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step < self.half_until:
            mask = batch["loss_mask"].clone()
            mask[(len(mask) + 1) // 2 :] = False
            batch = batch | {"loss_mask": mask}
        return super().training_step(batch, batch_idx)

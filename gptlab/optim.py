"""Parameter groups, the optimizer that torch lacks, and schedules as functions of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters by what they are: `matrix`, `embedding` (decayed as well) and `vector` (never decayed).

    Each group carries its `kind`, so that an optimizer may treat matrices in its own way. The output head counts as an
    embedding: its rows are tokens. A group's own entries win over the optimizer's defaults.
    """
    tokens = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear):
        tokens.add(id(head.weight))
    kinds: dict[str, list[Tensor]] = {"matrix": [], "embedding": [], "vector": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "embedding" if id(parameter) in tokens else "matrix" if parameter.ndim >= 2 else "vector"
            kinds[kind].append(parameter)
    groups: list[dict[str, Any]] = [{"kind": kind, "params": params} for kind, params in kinds.items() if params]
    for group in groups:
        if group["kind"] == "vector":
            group["weight_decay"] = 0.0
    return groups


class Muon(torch.optim.Optimizer):
    """torch's Muon for the matrices of the blocks and AdamW for all the rest, behind one optimizer.

    Muon's update is scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025, section 2.2), so that one
    learning rate and one decay serve both. The two share this optimizer's groups and state: a schedule reaches both,
    and a checkpoint holds both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ):
        groups = list(params)
        matrices = [group for group in groups if group["kind"] == "matrix"]
        others = [group for group in groups if group["kind"] != "matrix"]
        if not matrices or not others:
            raise ValueError("optimizer=muon needs both matrices and other parameters; use optimizer=adamw")
        self._muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(
            others, lr=lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps, fused=True
        )
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        count = len(self._muon.param_groups)
        self._muon.param_groups = self.param_groups[:count]
        self._adamw.param_groups = self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss


# Schedules: the learning rate at optimizer step `step` (from 0) of `total_steps`, as a factor of its peak. All warm up
# linearly, and reach the peak at step `warmup_steps`.


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1)) if warmup_steps else 1.0


def _progress(step: int, start: float, total_steps: int) -> float:
    """How far from `start` to the last step, 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))


def constant(step: int, total_steps: int, warmup_steps: int) -> float:
    return _warmup(step, warmup_steps)


def linear(step: int, total_steps: int, warmup_steps: int, final_factor: float) -> float:
    """Down in a straight line to `final_factor`."""
    decay = 1 - (1 - final_factor) * _progress(step, warmup_steps, total_steps)
    return min(_warmup(step, warmup_steps), decay)


def cosine(step: int, total_steps: int, warmup_steps: int, final_factor: float) -> float:
    """Down along half a cosine to `final_factor` (Loshchilov and Hutter 2017, eq. 5)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    half_cosine = 0.5 * (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps)))
    return final_factor + (1 - final_factor) * half_cosine


def wsd(step: int, total_steps: int, warmup_steps: int, decay_fraction: float, final_factor: float) -> float:
    """Warmup, stable, decay: at the peak until the last `decay_fraction` of the steps, then a line (Hu et al. 2024)."""
    last_at_peak = total_steps * (1 - decay_fraction) - 1
    decay = 1 - (1 - final_factor) * _progress(step, last_at_peak, total_steps)
    return min(_warmup(step, warmup_steps), decay)

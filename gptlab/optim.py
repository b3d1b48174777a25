"""Parameter groups, the optimizer that torch lacks, and schedules as functions of the step."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gptlab.cost import computes_in_bf16
from gptlab.sharding import local, share, whole

AT_ONCE = 2**26  # entries of matrices that Muon orthogonalises together: a quarter GiB, and a few times that in between
ONE_BY_ONE = {"fused": False, "foreach": False}  # a group's tensors are stepped one after another


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
        if len({isinstance(parameter, DTensor) for parameter in group["params"]}) > 1:
            group |= ONE_BY_ONE  # what takes many tensors at once takes one sort of them
    return groups


def keep_kernels(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint, to be computed with as this machine does, not as the one that wrote it."""
    groups = [
        group | {name: own[name] for name in ONE_BY_ONE if name in own}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return state | {"param_groups": groups}


class Muon(Optimizer):
    """Muon for the matrices of the blocks and AdamW for all the rest, behind one optimizer.

    It is torch's Muon (Jordan et al. 2024), scaled to the size of AdamW's updates (Liu et al. 2025, section 2.2), so
    that one learning rate and one decay serve both. Torch's own class orthogonalises matrix by matrix and always in
    bfloat16, which a processor without it emulates at a fortieth of the speed (benchmarks/muon.py); here matrices
    with one narrower side go together, in the type in which the device computes. One state holds both halves: a
    schedule reaches both, and so does a file.

    `width` is that of the network for which the learning rate was found. Matrices of another learn at this rate times
    the root of `width` over their own, so that an update changes what they do to a vector by as much at any width (its
    spectral norm: Yang et al. 2023), and the rate serves there too (experiments/lr_transfer). None: as torch's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        width: int | None,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"optimizer.momentum={momentum} is not in [0, 1)")
        if width is not None and width < 1:
            raise ValueError(f"optimizer.width={width} must be at least 1, or null for one rate at any width")
        groups = list(params)
        matrices = [group for group in groups if group["kind"] == "matrix"]
        others = [group for group in groups if group["kind"] != "matrix"]
        if odd := [tuple(p.shape) for group in matrices for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"optimizer=muon takes matrices, and a parameter has the shape {odd[0]}; use adamw")
        if not matrices or not others:
            raise ValueError("optimizer=muon needs both matrices and other parameters; use optimizer=adamw")
        self._adamw = torch.optim.AdamW(
            others, lr=lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps, fused=True
        )
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        self.width = width
        super().__init__([*({**defaults, **group} for group in matrices), *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        self._adamw.param_groups = [group for group in self.param_groups if group["kind"] != "matrix"]
        self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "matrix":
                self._step_matrices(group)
        self._adamw.step()
        return loss

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        for parameters in batches([parameter for parameter in group["params"] if parameter.grad is not None]):
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov's
            # Of a network that is split over ranks, each puts the matrices together, and keeps its part of the update.
            updates = orthogonal([whole(matrix) for matrix in ahead])
            own = [local(share(update, like)) for update, like in zip(updates, parameters, strict=True)]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for update, parameter in zip(own, parameters, strict=True):
                rate = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))  # its entries are then as large as AdamW's
                if self.width is not None:
                    rate *= math.sqrt(self.width / min(parameter.shape))
                local(parameter).add_(update, alpha=-rate)


def batches(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices in groups with one narrower side, sorted by shape, none larger than what is computed at once."""
    by_side: dict[int, list[Tensor]] = {}
    for matrix in sorted(matrices, key=lambda matrix: matrix.shape):
        by_side.setdefault(min(matrix.shape), []).append(matrix)
    for alike in by_side.values():
        group: list[Tensor] = []
        for matrix in alike:
            if group and sum(map(Tensor.numel, group)) + matrix.numel() > AT_ONCE:
                yield group
                group = []
            group.append(matrix)
        yield group


A, B, C = 3.4445, -4.7750, 2.0315  # a step of Newton-Schulz: X <- (A I + B G + C G^2) X, G = X X^T
LEAPS = (2, 2, 1)  # steps at once; after three, bfloat16's rounding has grown


def orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """About U V^T for each U S V^T of `matrices`: five steps of a quintic Newton-Schulz iteration.

    Singular values end between 0.7 and 1.2, in bfloat16 up to 1.3, which serves as well as 1 (Jordan et al. 2024). A
    step multiplies X by a polynomial of G, and so is the next G: some steps need only G, whose side is the narrower one
    of the matrix. Matrices of all shapes go through these together, in one batch of squares; they must have that side
    in common, and neighbours of one shape are multiplied together too.
    """
    stacks = [normalised(list(alike)) for _, alike in groupby(matrices, lambda matrix: matrix.shape)]
    sizes = [len(x) for x in stacks]
    for steps in LEAPS:
        gram = torch.cat([x.mT @ x if is_tall(x) else x @ x.mT for x in stacks])
        factors = polynomial(gram, steps).split(sizes)
        stacks = [x @ p.mT if is_tall(x) else p @ x for x, p in zip(stacks, factors, strict=True)]
    return [matrix for x in stacks for matrix in x]


def normalised(matrices: list[Tensor]) -> Tensor:
    """Matrices of one shape (N, rows, columns), in the type in which the device computes, each of Frobenius norm 1."""
    dtype = torch.bfloat16 if computes_in_bf16(matrices[0].device.type) else torch.float32
    x = torch.empty(len(matrices), *matrices[0].shape, dtype=dtype, device=matrices[0].device)
    for slot, matrix in zip(x, matrices, strict=True):
        slot.copy_(matrix)
    return x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))


def is_tall(x: Tensor) -> bool:
    return x.size(-2) > x.size(-1)


def polynomial(gram: Tensor, steps: int) -> Tensor:
    """What so many steps multiply X by, (N, D, D), from G (N, D, D)."""
    product = A * torch.eye(gram.size(1), dtype=gram.dtype, device=gram.device)
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)  # a step multiplies by A I + this
        product = torch.baddbmm(product, factor, product, beta=A) if step else factor + product
        if step < steps - 1:
            half = torch.baddbmm(gram, factor, gram, beta=A)
            gram = torch.baddbmm(half, half, factor, beta=A)
    return product


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

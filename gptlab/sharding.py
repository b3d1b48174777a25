"""Tensors of which each rank holds a part: whole ones from parts, parts of whole ones, and splitting a network."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Any) -> Any:
    """A tensor put together from all ranks, which must all ask for it. Anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole `tensor` that every rank holds, placed as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def is_split(model: nn.Module) -> bool:
    """Whether this rank holds only a part of the network."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm_square(parameters: Iterable[Tensor], world_size: int) -> Tensor:
    """This rank's share of the squared norm of all gradients, (1,): over all ranks, they add up to it."""
    by_copies: dict[int, list[Tensor]] = {}  # how many ranks hold the same part
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            copies = world_size
            if isinstance(gradient, DTensor):
                sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
                copies //= math.prod(size for size, placement in sizes if placement.is_shard())
            by_copies.setdefault(copies, []).append(local(gradient))
    norms = [torch.nn.utils.get_total_norm(held).square() / copies for copies, held in by_copies.items()]
    return torch.stack(norms).sum(dim=0, keepdim=True)


def split(model: nn.Module, mesh: Any) -> None:
    """Split a network over the ranks of `mesh`, (data_parallel, tensor_parallel), in place."""
    from torch.distributed.fsdp import fully_shard

    if mesh["data_parallel"].size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])

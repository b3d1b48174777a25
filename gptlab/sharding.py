"""Tensors of which each rank holds a part: whole ones from parts, parts of whole ones, and splitting a network."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gptlab.model import GELU, Attention, Block, SwiGLU

OWN_PARTS = {"qkv", "q_norm", "k_norm", "gate_up", "up", "proj"}  # of `Attention` and the MLPs


def whole(value: Any, order: Tensor | None = None) -> Any:
    """A tensor put together from all ranks, which must all ask for it, with its rows where `order` has taken them from;
    anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    value = value.full_tensor()
    return value if order is None else torch.empty_like(value).index_copy_(0, order.to(value.device), value)


def share(tensor: Tensor, like: Tensor, order: Tensor | None = None) -> Tensor:
    """This rank's part of a whole `tensor` that every rank holds, its rows in `order`, placed as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    if order is not None:
        tensor = tensor[order.to(tensor.device)]
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def row_orders(module: nn.Module) -> dict[Tensor, Tensor]:
    """Of each parameter whose rows stand in another order than in a network of one rank, that order."""
    linears = [part for part in module.modules() if hasattr(part, "row_order")]
    return {parameter: linear.row_order for linear in linears for parameter in linear.parameters()}


def is_split(model: nn.Module) -> bool:
    """Whether this rank holds only a part of the network."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def of_first_rank(number: int, device: torch.device) -> int:
    """The first rank's number, on all ranks: rounding must not lead them apart."""
    box = torch.tensor([number], device=device)
    torch.distributed.broadcast(box, src=0)
    return int(box)


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
    squares = [torch.stack(torch._foreach_norm(held)).square().sum() / copies for copies, held in by_copies.items()]
    return torch.stack(squares).sum(dim=0, keepdim=True)


def split(model: nn.Module, mesh: DeviceMesh, computed_in: torch.dtype | None = None) -> None:
    """Split a `GPT` over the ranks of `mesh`, (data_parallel, tensor_parallel), in place.

    `computed_in`: the type in which autocast multiplies matrices, if not their own.
    """
    rows, heads = mesh["data_parallel"], mesh["tensor_parallel"]
    if heads.size() > 1:
        for block in model.blocks:
            split_heads(block, heads)
    elif rows.size() > 1:
        for block in model.blocks:
            split_rows(block, rows, computed_in)
        fully_shard(model, mesh=rows)


def split_rows(block: nn.Module, mesh: DeviceMesh, computed_in: torch.dtype | None) -> None:
    """Give each rank its share of the rows of every tensor (FSDP2), in place.

    The matrices of a block are gathered as one, in the type in which they are multiplied: autocast would make that copy
    of what was gathered in full, and keep it of every block until the backward pass. Norms, which it computes in
    float32, are gathered with the embeddings; so not a bit of the result differs from that of whole copies. Blocks with
    other parts are gathered as they are.
    """
    if type(block) is Block and all(is_own(part) for part in (block.attention, block.mlp)):
        policy = MixedPrecisionPolicy(computed_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard([block.attention, block.mlp], mesh=mesh, mp_policy=policy)
    else:
        fully_shard(block, mesh=mesh)


def is_own(part: nn.Module) -> bool:
    """Whether an attention or MLP has the parameters of gptlab's own and no others."""
    return {name.split(".")[0] for name, _ in part.named_parameters()} <= OWN_PARTS


def require_splittable(model: nn.Module, ranks: int) -> None:
    """Raise ValueError where `split_heads` cannot share the blocks of a `GPT` among so many ranks."""
    for block in model.blocks:
        parts = [block, block.attention, block.mlp] if isinstance(block, Block) else [block]
        for part in parts:
            if type(part).__init__ not in [kind.__init__ for kind in (Block, Attention, SwiGLU, GELU)]:
                raise ValueError(
                    f"trainer=tp cannot split {type(part).__qualname__}, made of other parts; use trainer=fsdp"
                )
        heads, width = block.attention, block.mlp.proj.in_features
        counts = {"n_head": heads.n_head, "n_kv_head": heads.n_kv_head, "mlp_width": width}
        for name, count in counts.items():
            if count % ranks:
                raise ValueError(
                    f"model.{name}={count} cannot be shared by {ranks} ranks: use a trainer.devices that divides it"
                )


def split_heads(block: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank its share of the heads and of the MLP's width (Shoeybi et al. 2019, section 3), in place.

    The two matrices of each pair are split by their inner side, so that one sum over the ranks follows each pair.
    Embeddings, norms and the output head stay whole on every rank.
    """
    ranks, attention, mlp = mesh.size(), block.attention, block.mlp
    hidden, width = mlp.proj.in_features, attention.head_width
    split_pair(
        attention, "qkv", [n * width for n in (attention.n_head, attention.n_kv_head, attention.n_kv_head)], mesh
    )
    attention.n_head, attention.n_kv_head = attention.n_head // ranks, attention.n_kv_head // ranks
    for norm in (attention.q_norm, attention.k_norm):
        for parameter in norm.parameters():  # each rank's gradient is that of its own heads
            parameter.register_hook(lambda gradient: all_reduce(gradient, "sum", mesh))
    first = "gate_up" if hasattr(mlp, "gate_up") else "up"
    split_pair(mlp, first, [hidden] * (getattr(mlp, first).out_features // hidden), mesh)


def split_pair(part: nn.Module, first: str, sections: list[int], mesh: DeviceMesh) -> None:
    """Split the matrix `first` of `part` by rows and its `proj` by columns.

    `first` holds several matrices one below the other, of as many rows as `sections` say. Its rows are put in an order
    in which each rank's share holds its part of every one of them; the module remembers it as `row_order`.
    """
    linear, ranks = getattr(part, first), mesh.size()
    places = torch.arange(sum(sections)).split(sections)
    order = torch.cat([rows.chunk(ranks)[rank] for rank in range(ranks) for rows in places])
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(parameter[order.to(parameter.device)])
    parallelize_module(part, mesh, {first: ColwiseParallel(), "proj": RowwiseParallel()})
    linear.row_order = order

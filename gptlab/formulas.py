"""Linear layers and nonlinearities; what is compiled for a CPU gets formulas that it computes faster.

They are equal but for rounding. A compiler for a CPU takes as long for a tanh as for three sigmoids; left to itself it
keeps in memory what the backward pass could compute again, and does compute again what it has in memory. Shapes: any;
W is the width of an MLP, K and N those of a linear layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

OWN_FORMULAS = True  # where they pay: in what is compiled for a CPU


def compiled_for_cpu(x: Tensor) -> bool:
    return OWN_FORMULAS and torch.compiler.is_compiling() and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (..., N), of x (..., K), W (N, K) and b (N,)."""
    if not compiled_for_cpu(x):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        x, weight = (each.to(torch.get_autocast_dtype("cpu")) for each in (x, weight))
    return LinearByParts.apply(x, weight, bias)


def gelu(x: Tensor) -> Tensor:
    """GELU in GPT-2's approximation by a tanh (Hendrycks and Gimpel 2016)."""
    return GELUBySigmoid.apply(x) if compiled_for_cpu(x) else F.gelu(x, approximate="tanh")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), (..., W), of both side by side (..., 2 W)."""
    if compiled_for_cpu(gate_up):
        return SwiGLUOfOne.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def keep(x: Tensor) -> Tensor:
    """x, which a compiler then keeps for the backward pass rather than compute it again.

    It computes again what is on a list of its own, on which all arithmetic is, and `split`, but not this: one split by
    sizes, of one size. Where that changes, all is still right, and slower.
    """
    return x.split((x.size(-1),), dim=-1)[0]


def wide(x: Tensor) -> Tensor:
    """In float32, or more where it has more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


A, B = 1.5957691216057308, 0.044715  # 2 sqrt(2 / pi), and the share of the cube


class LinearByParts(torch.autograd.Function):
    """The bias is added by what comes next, since a product with a bias begins by copying it into every row.

    The bias's gradient comes last: the compiler then sums up what the products have read, rather than computing that
    once more, column by column. That of the weights is a product whose left matrix is transposed, which goes faster
    where that is the wider of the two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight)
        return y if bias is None else (wide(y) + bias).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, d_rows = x.reshape(-1, x.size(-1)), gradient.reshape(-1, gradient.size(-1))
        d_x = (d_rows @ weight).view_as(x)
        if weight.size(0) >= weight.size(1):
            d_weight = d_rows.mT @ rows
        else:
            d_weight = (rows.mT @ d_rows).mT.contiguous()  # else autograd copies it
        d_bias = wide(d_rows).sum(dim=0) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias


class GELUBySigmoid(torch.autograd.Function):
    """x (1 + tanh(u)) / 2 = x sigmoid(2 u), where u = sqrt(2 / pi) (x + 0.044715 x^3).

    Its slope is found while the sigmoid is there, and kept in place of x: an exponential takes longer than memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        w = wide(x)
        square = w * w
        s = torch.sigmoid(w * (A + A * B * square))
        y = w * s
        ctx.save_for_backward(keep((s + y * (1 - s) * (A + 3 * A * B * square)).to(x.dtype)))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return (wide(gradient) * wide(slope)).to(slope.dtype)


class SwiGLUOfOne(torch.autograd.Function):
    """Of gate and up, side by side; as above, both slopes are kept in their place."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = (wide(half) for half in gate_up.chunk(2, dim=-1))
        s = torch.sigmoid(gate)
        slopes = (up * s * (1 + gate * (1 - s)), gate * s)
        ctx.save_for_backward(*(keep(slope.to(gate_up.dtype)) for slope in slopes))
        return (gate * s * up).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slopes = ctx.saved_tensors
        return torch.cat([wide(gradient) * wide(slope) for slope in slopes], dim=-1).to(slopes[0].dtype)

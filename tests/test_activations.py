"""What is compiled for a CPU computes the same nonlinearities by other formulas, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F

from gptlab import activations
from gptlab.activations import gelu, swiglu


def plain_gelu(x):
    return F.gelu(x, approximate="tanh")


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


PAIRS = [(gelu, plain_gelu), (swiglu, plain_swiglu)]


def value_and_gradient(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize(("own", "plain"), PAIRS)
def test_own_formulas_equal_torch_s(monkeypatch, own, plain):
    """Far into both tails, where an exponential overflows and a tanh is 1 or -1."""
    x = torch.cat((torch.linspace(-60, 60, 501), torch.linspace(-3, 3, 501))).double().view(3, 334)
    expected = value_and_gradient(plain, x)
    monkeypatch.setattr(activations, "compiled_for_cpu", lambda x: True)
    for found, wanted in zip(value_and_gradient(own, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("own", "plain"), PAIRS)
def test_in_bf16_they_are_as_close_to_the_truth_as_torch_s(monkeypatch, own, plain):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 3
    rounded = x.bfloat16()
    truth = value_and_gradient(plain, rounded.double())
    of_torch = value_and_gradient(plain, rounded)
    monkeypatch.setattr(activations, "compiled_for_cpu", lambda x: True)
    for found, theirs, true in zip(value_and_gradient(own, rounded), of_torch, truth, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - true).norm() <= 1.1 * (theirs.double() - true).norm()


@pytest.mark.parametrize(("own", "plain"), PAIRS)
def test_a_compiler_for_a_cpu_gets_them_and_nobody_else(monkeypatch, own, plain):
    asked = []
    real = activations.compiled_for_cpu
    monkeypatch.setattr(activations, "compiled_for_cpu", lambda x: asked.append(real(x)) or asked[-1])
    x = torch.randn(2, 8)
    torch.testing.assert_close(torch.compile(own, dynamic=False)(x), plain(x))
    assert asked == [True]
    assert torch.equal(own(x), plain(x))
    assert asked == [True, False]

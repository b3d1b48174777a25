"""What is compiled for a CPU computes the same by other formulas, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

from gptlab import formulas
from gptlab.attention import Products
from gptlab.formulas import GELUBySigmoid, SwiGLUOfOne, gelu, linear, swiglu
from gptlab.losses import SummedNLL


def plain_gelu(x):
    return F.gelu(x, approximate="tanh")


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


PAIRS = [(gelu, plain_gelu), (swiglu, plain_swiglu)]


def value_and_gradient(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    direction = torch.linspace(-1, 1, y.numel()).bfloat16().to(y.dtype)  # the same numbers in any type
    (gradient,) = torch.autograd.grad((y * direction.view_as(y)).sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize(("own", "plain"), PAIRS)
def test_own_formulas_equal_torch_s(monkeypatch, own, plain):
    """Far into both tails, where an exponential overflows and a tanh is 1 or -1."""
    x = torch.cat((torch.linspace(-60, 60, 501), torch.linspace(-3, 3, 501))).double().view(3, 334)
    expected = value_and_gradient(plain, x)
    monkeypatch.setattr(formulas, "compiled_for_cpu", lambda x: True)
    for found, wanted in zip(value_and_gradient(own, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("own", "plain"), PAIRS)
def test_in_bf16_they_are_about_as_close_to_the_truth_as_torch_s(monkeypatch, own, plain):
    """A slope is rounded to be kept, its product with the gradient once more: GELU's is 0.24 % off, torch's 0.15."""
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 3
    rounded = x.bfloat16()
    truth = value_and_gradient(plain, rounded.double())
    of_torch = value_and_gradient(plain, rounded)
    monkeypatch.setattr(formulas, "compiled_for_cpu", lambda x: True)
    found = value_and_gradient(own, rounded)
    for mine, theirs, true, at_most in zip(found, of_torch, truth, (1.1, 1.9), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - true).norm() <= at_most * (theirs.double() - true).norm()
        assert (mine.double() - true).norm() <= 2**-8 * true.norm()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: GELUBySigmoid.apply(x),
        lambda x: SwiGLUOfOne.apply(x),
        lambda x: Products.apply(x.view(1, 1, 4, 8), x.view(1, 1, 4, 8), x.view(1, 1, 4, 8), 0.0, 4),
        lambda x: SummedNLL.apply(x, torch.ones(3, 8), torch.arange(4) % 3, torch.ones(4, dtype=torch.bool), 3),
    ],
)
def test_what_keeps_its_gradient_says_that_it_has_no_second_one(function):
    """Else it would be taken for a constant."""
    x = torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("calls_in_cpp", [False, True])
@pytest.mark.parametrize(("own", "plain"), PAIRS)
def test_no_exponential_is_left_to_the_backward_pass(own, plain, calls_in_cpp):
    """An alarm rather than a fault: a compiler may change its mind about what it computes again, and is slower then."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    x = torch.randn(64, 64).bfloat16().requires_grad_()
    with torch._inductor.config.patch(cpp_wrapper=calls_in_cpp):
        _, (forward, backward) = run_fw_bw_and_get_code(lambda: torch.compile(own, dynamic=False)(x))
    assert "exp(" in forward
    assert "exp(" not in backward


@pytest.mark.parametrize(("own", "plain"), PAIRS)
def test_a_compiler_for_a_cpu_gets_them_and_nobody_else(monkeypatch, own, plain):
    asked = []
    real = formulas.compiled_for_cpu
    monkeypatch.setattr(formulas, "compiled_for_cpu", lambda x: asked.append(real(x)) or asked[-1])
    x = torch.randn(2, 8)
    torch.testing.assert_close(torch.compile(own, dynamic=False)(x), plain(x))
    assert asked == [True]
    assert torch.equal(own(x), plain(x))
    assert asked == [True, False]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("K", "N"), [(8, 24), (24, 8)])
def test_a_linear_layer_equals_torch_s_in_value_and_every_gradient(monkeypatch, K, N, bias):
    torch.manual_seed(0)
    x, weight, at, b = torch.randn(2, 5, K), torch.randn(N, K), torch.randn(2, 5, N), torch.randn(N)
    given = [each.double().requires_grad_() for each in (x, weight, *([b] if bias else []))]
    found = {}
    for own in (False, True):
        monkeypatch.setattr(formulas, "compiled_for_cpu", lambda x, own=own: own)
        y = linear(*given, *([] if bias else [None]))
        found[own] = (y, *torch.autograd.grad(y, given, at.double()))
    for mine, theirs in zip(found[True], found[False], strict=True):
        assert mine.is_contiguous()  # else autograd copies it
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiler_for_a_cpu_gets_linear_layers_by_parts(bias):
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return aot_eager(graph, inputs)

    weight, b = torch.randn(4, 8), torch.randn(4) if bias else None
    for x in (torch.randn(8), torch.randn(2, 3, 8)):
        given = [each.clone().requires_grad_() for each in (x, weight)]
        found, wanted = torch.compile(linear, backend=backend, dynamic=False)(*given, b), F.linear(*given, b)
        assert graphs.pop()[0] == "autograd_function_apply"  # and so no linear layer of torch
        torch.testing.assert_close(found, wanted)
        of_found, of_wanted = (torch.autograd.grad(y.square().sum(), given) for y in (found, wanted))
        torch.testing.assert_close(of_found, of_wanted)
        assert torch.equal(linear(x, weight, b), F.linear(x, weight, b))


def test_a_compiled_linear_layer_is_about_as_close_to_the_truth_as_autocast():
    """The product is rounded before the bias is added and after it, where torch rounds once: a quarter more off."""
    torch.manual_seed(0)
    given = [torch.randn(6, 16), torch.randn(32, 16), torch.randn(32)]
    at = torch.randn(6, 32).bfloat16()

    def all_of_it(function, dtype=torch.float32):
        leaves = [each.detach().to(dtype).requires_grad_() for each in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = function(*leaves)
        return (y, *torch.autograd.grad(y, leaves, at.to(y.dtype)))

    truth = all_of_it(F.linear, torch.float64)
    plain, own = all_of_it(F.linear), all_of_it(torch.compile(linear, dynamic=False))
    for found, theirs, true in zip(own, plain, truth, strict=True):
        assert found.dtype == theirs.dtype
        assert (found.double() - true).norm() <= 1.3 * (theirs.double() - true).norm()

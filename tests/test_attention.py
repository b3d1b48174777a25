"""All ways to attend are one: in value, in gradient, and in what they leave out."""

import pytest
import torch
import torch.nn.functional as F

from gptlab import attention


def inputs(heads: int, kv_heads: int, T: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, heads, T, 8), (2, kv_heads, T, 8), (2, kv_heads, T, 8)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query, one head at a time."""
    B, H, T, E = q.shape
    out = torch.empty(B, H, T, E, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                kv = h // (H // k.size(1))
                weights = (k[b, kv, : t + 1] @ q[b, h, t] / E**0.5).softmax(dim=0)
                out[b, h, t] = weights @ v[b, kv, : t + 1]
    return out


@pytest.mark.parametrize("T", [1, 7, 16, 50])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_products_equal_the_naive_loop_and_the_kernel_in_value_and_gradient(heads, kv_heads, T):
    """With whole and with cut blocks of queries."""
    q, k, v = inputs(heads, kv_heads, T)
    ways = {
        "naive": naive(q, k, v),
        "kernel": F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads),
        "products": attention.products(q, k, v, 0.0, block=16),
    }
    direction = torch.randn_like(ways["naive"])
    gradients = {name: torch.autograd.grad((way * direction).sum(), (q, k, v)) for name, way in ways.items()}
    for name in ("kernel", "products"):
        torch.testing.assert_close(ways[name], ways["naive"])
        for found, expected in zip(gradients[name], gradients["naive"], strict=True):
            torch.testing.assert_close(found, expected)


def test_dropout_of_products_leaves_the_mean_as_it_is():
    q, k, v = inputs(2, 2, 4)
    with torch.no_grad():
        mean = torch.stack([attention.products(q, k, v, 0.3) for _ in range(4000)]).mean(dim=0)
        torch.testing.assert_close(mean, attention.products(q, k, v, 0.0), rtol=0, atol=0.1)


def test_a_compiled_network_on_a_cpu_takes_products_up_to_a_length(monkeypatch):
    taken = []
    real = attention.products
    monkeypatch.setattr(attention, "products", lambda *arguments: taken.append(True) or real(*arguments))
    monkeypatch.setattr(attention, "PRODUCTS_UP_TO", 16)
    q, k, v = inputs(2, 2, 16, torch.float32)
    expected = attention.attend(q, k, v, causal=True)
    assert not taken
    torch.testing.assert_close(torch.compile(attention.attend, dynamic=False)(q, k, v, causal=True), expected)
    assert taken
    taken.clear()
    longer = inputs(2, 2, 17, torch.float32)
    torch.compile(attention.attend, dynamic=False)(*longer, causal=True)
    assert not taken

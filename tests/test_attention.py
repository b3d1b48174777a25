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


@pytest.mark.parametrize("block", [4, 16])
def test_products_have_the_gradient_of_what_dropout_has_left(block):
    """Against torch's own differentiation of a softmax, of which the same weights are dropped."""
    q, k, v = inputs(2, 2, 12)
    direction = torch.randn_like(q)
    torch.manual_seed(1)
    found = attention.products(q, k, v, 0.4, block)
    torch.manual_seed(1)
    rows = []
    for start in range(0, 12, block):
        stop = min(start + block, 12)
        scores = q[:, :, start:stop] @ k[:, :, :stop].mT / 8**0.5
        ahead = torch.ones(stop - start, stop, dtype=torch.bool).triu(start + 1)
        rows.append(F.dropout(scores.masked_fill(ahead, -torch.inf).softmax(dim=-1), 0.4) @ v[:, :, :stop])
    expected = torch.cat(rows, dim=2)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((y * direction).sum(), (q, k, v)) for y in (found, expected)]
    for own, of_torch in zip(*gradients, strict=True):
        torch.testing.assert_close(own, of_torch)


def test_products_in_bf16_are_as_close_to_the_truth_as_a_softmax_that_torch_differentiates():
    exact = [(x.detach() * 2).bfloat16().double().requires_grad_() for x in inputs(2, 2, 96)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    direction = torch.randn_like(rounded[0])

    def plain(q, k, v):
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / 8**0.5
        ahead = torch.ones(96, 96, dtype=torch.bool).triu(1)
        return scores.masked_fill(ahead, -torch.inf).softmax(dim=-1).to(v.dtype) @ v

    def found(attend, inputs):
        y = attend(*inputs)
        return y, *torch.autograd.grad((y * direction.to(y.dtype)).sum(), inputs)

    truth, of_torch = found(plain, exact), found(plain, rounded)
    own = found(lambda q, k, v: attention.products(q, k, v, 0.0, block=32), rounded)
    for mine, theirs, true in zip(own, of_torch, truth, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - true).norm() < 1.25 * (theirs.double() - true).norm()


def test_dropout_of_products_leaves_the_mean_as_it_is():
    q, k, v = inputs(2, 2, 4)
    with torch.no_grad():
        mean = torch.stack([attention.products(q, k, v, 0.3) for _ in range(4000)]).mean(dim=0)
        torch.testing.assert_close(mean, attention.products(q, k, v, 0.0), rtol=0, atol=0.1)


@pytest.mark.parametrize(("tiles", "dtype", "queries"), [(1, "bfloat16", 256), (1, "float32", 64), (0, "bfloat16", 64)])
def test_more_queries_go_at_a_time_where_the_processor_multiplies_tiles(monkeypatch, tiles, dtype, queries):
    monkeypatch.setattr(attention, "HAS_TILES", bool(tiles))
    monkeypatch.setattr(attention.Products, "apply", lambda q, k, v, dropout, block: block)
    assert attention.products(*inputs(2, 2, 4, getattr(torch, dtype)), 0.0) == queries


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


def test_compiled_products_equal_the_kernel_in_value_and_gradient_beyond_a_block(monkeypatch):
    """And each block's softmax is one loop, whose float32 stays in a buffer of its own: of torch as it is pinned."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    monkeypatch.setattr(attention, "HAS_TILES", True)
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs(2, 1, 300)]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    with torch._inductor.config.patch(cpp_wrapper=False):
        y, (forward, _) = run_fw_bw_and_get_code(
            lambda: torch.compile(attention.attend, dynamic=False)(*rounded, causal=True)
        )
    assert "local_buffer" in forward
    of_kernel = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    true = (of_kernel, *torch.autograd.grad(of_kernel.sum(), exact))
    for mine, theirs in zip((y, *(x.grad for x in rounded)), true, strict=True):
        assert (mine.double() - theirs).norm() < 0.01 * theirs.norm()

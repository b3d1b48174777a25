"""The pure functions, each against the plainest way to say the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptlab import losses
from gptlab.losses import document_layout, masked_sum, scored, summed_nll, token_nll


def test_token_nll_is_the_log_softmax_of_the_target():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 7, 11, generator=generator)
    targets = torch.randint(11, (3, 7), generator=generator)
    expected = -logits.double().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_nll(logits, targets).double(), expected, rtol=1e-6, atol=1e-6)


def test_token_nll_is_computed_in_float32():
    logits = torch.tensor([[[300.0, 0.0, -300.0], [1.0, 2.0, 3.0]]], dtype=torch.bfloat16)
    targets = torch.tensor([[2, 0]])
    got = token_nll(logits, targets)
    assert got.dtype == torch.float32
    assert torch.equal(got, token_nll(logits.float(), targets))
    assert got[0, 0] == 600


def test_masked_sum():
    values = torch.arange(6.0).view(2, 3)
    loss_mask = torch.tensor([[True, False, True], [False, False, True]])
    assert masked_sum(values, loss_mask) == 0 + 2 + 5
    assert masked_sum(values, torch.zeros_like(loss_mask)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_masked_value_counts_for_nothing(bad):
    values = torch.tensor([[1.0, bad]], requires_grad=True)
    total = masked_sum(values, torch.tensor([[True, False]]))
    total.backward()
    assert total == 1
    assert values.grad.tolist() == [[1.0, 0.0]]


@pytest.fixture(params=["at once", "in parts"])
def pieces(request, monkeypatch):
    """Logits of 3 x 7 tokens all at once, or of four tokens at a time, the last time of one."""
    if request.param == "in parts":
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * 16 + 15)


def problem(dtype=torch.float32, vocab_size=11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 8, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
    weight = torch.randn(16, 8, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (3, 7), generator=generator)
    return hidden, weight, targets, torch.rand(3, 7, generator=generator) < 0.7


@pytest.mark.parametrize("vocab_size", [11, 16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_loss_without_whole_logits_is_the_plain_one_and_so_are_its_gradients(pieces, compiled, vocab_size):
    hidden, weight, targets, loss_mask = problem(torch.float64, vocab_size)
    plain = masked_sum(
        -(hidden @ weight.T)[..., :vocab_size].log_softmax(-1).gather(-1, targets[..., None])[..., 0], loss_mask
    )
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    hidden, weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    torch._dynamo.reset()
    function = torch.compile(summed_nll, backend="aot_eager") if compiled else summed_nll
    total = function(hidden, weight, targets, loss_mask, vocab_size)
    assert float(total) == pytest.approx(float(plain), rel=1e-6)
    for got, want in zip(torch.autograd.grad(3 * total, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_products_are_bf16_and_the_loss_float32(pieces):
    hidden, weight, targets, loss_mask = problem()
    with torch.autocast("cpu", torch.bfloat16):
        plain = masked_sum(token_nll((hidden @ weight.T)[..., :11], targets), loss_mask)
        total = summed_nll(hidden, weight, targets, loss_mask, 11)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(plain), rel=1e-6)
    expected, got = (torch.autograd.grad(x, (hidden, weight)) for x in (plain, total))
    for a, b in zip(expected, got, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)


def test_scores_are_those_of_whole_logits(pieces):
    hidden, weight, targets, _ = problem()
    with torch.no_grad():
        weight[11:] = 100 * hidden[0, 0]  # rows that only fill up the matrix would be the likeliest
        logits = (hidden @ weight.T)[..., :11]
        nll, likeliest = scored(hidden, weight, targets, 11)
    torch.testing.assert_close(nll, token_nll(logits, targets))
    assert torch.equal(likeliest, logits.argmax(dim=-1))


def test_no_tensor_is_as_large_as_the_logits(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 10_000)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            largest[0] = max([largest[0], *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
            return made

    hidden, weight = torch.randn(20, 50, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    targets = torch.randint(1000, (20, 50))
    with Watch():
        summed_nll(hidden, weight, targets, torch.ones_like(targets, dtype=torch.bool), 1000).backward()
        scored(hidden, weight, targets, 1000)
    assert 5_000 < largest[0] <= 10_000  # of a million


def naive_layout(row: list[int], end_id: int) -> tuple[list[int], list[int]]:
    document, position, documents, positions = 0, 0, [], []
    for token in row:
        documents.append(document)
        positions.append(position)
        position += 1
        if token == end_id:
            document, position = document + 1, 0
    return documents, positions


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1)),
    st.integers(0, 3),
)
def test_document_layout_is_the_loop(rows, end_id):
    document_ids, positions = document_layout(torch.tensor(rows), end_id)
    expected = [naive_layout(row, end_id) for row in rows]
    assert document_ids.tolist() == [documents for documents, _ in expected]
    assert positions.tolist() == [places for _, places in expected]

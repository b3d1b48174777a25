"""The pure functions, each against the plainest way to say the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.losses import document_layout, masked_sum, token_nll


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

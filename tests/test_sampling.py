"""Drawing tokens: the distributions that transformers' processors make, and the draws of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gptlab.sampling import Sampling

V = 40
LOGITS = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 3


def probabilities(sampling: Sampling, seen: torch.Tensor | None = None) -> torch.Tensor:
    ids, weights = sampling.distribution(LOGITS, seen)
    whole = torch.zeros(V)
    whole[torch.arange(V) if ids is None else ids] = weights
    return whole / whole.sum()


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.4, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_it_is_what_transformers_makes_of_it(repetition_penalty, temperature, top_k, top_p, min_p):
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition_penalty)])
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    processors += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    prompt = torch.tensor([[1, 5, 5, 30, 2]])
    expected = processors(prompt, LOGITS[None].clone())[0].softmax(-1)
    seen = torch.zeros(V, dtype=torch.bool)
    seen[prompt[0]] = True
    found = probabilities(Sampling(repetition_penalty, temperature, top_k, top_p, min_p), seen)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=2.0, top_k=3), Sampling(top_p=0.8), Sampling(min_p=0.2)]
)
def test_draws_follow_the_distribution(sampling):
    expected, n, generator = probabilities(sampling), 10_000, torch.Generator().manual_seed(0)
    found = torch.bincount(torch.tensor([sampling.draw(LOGITS, generator) for _ in range(n)]), minlength=V) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 4 * error).all()


@given(
    temperature=st.floats(0, 1e300),
    top_k=st.none() | st.integers(1, 2 * V),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_whatever_may_be_asked_for_gives_a_token(**values):
    sampling = Sampling(**values)
    ids, weights = sampling.distribution(LOGITS, torch.ones(V, dtype=torch.bool))
    assert weights.max() > 0
    assert weights.isfinite().all()
    token = sampling.draw(LOGITS, sampling.generator(), torch.ones(V, dtype=torch.bool))
    assert 0 <= token < V
    assert weights[token if ids is None else (ids == token).nonzero()[0, 0]] > 0


def test_zero_is_the_likeliest_even_of_equals():
    assert Sampling(temperature=0).draw(torch.tensor([1.0, 3.0, 3.0]), torch.Generator()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"))),
        *(("top_k", value) for value in (0, -3)),
        *(("top_p", value) for value in (0.0, 1.1, float("nan"))),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, float("nan"))),
        ("seed", 2**63),
    ],
)
def test_values_that_cannot_be_are_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value}"):
        Sampling(**{field: value})


def test_seeds_repeat_and_none_does_not():
    draws = [
        [Sampling(seed=seed).draw(LOGITS / 10, Sampling(seed=seed).generator(k)) for k in range(30)]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len({Sampling().draw(torch.zeros(10_000), Sampling().generator()) for _ in range(5)}) > 1
    assert Sampling(seed=-7).draw(LOGITS, Sampling(seed=-7).generator(2)) >= 0

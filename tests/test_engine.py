"""Generation: the same tokens as without a cache, the same for a seed, and nothing else touched."""

import pytest
import torch
from torch import Tensor

from gptlab.engine import generate, sample
from gptlab.model import GPT, GPTConfig

GREEDY = {"temperature": 0.0, "top_k": None, "seed": 0}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True}


def build(**changes) -> GPT:
    """A small network in float64 whose weights are large enough that it has opinions."""
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16, "init_std": 0.5}
    settings["tie_embeddings"] = False  # tied ones like to repeat themselves
    return GPT(GPTConfig(**settings | changes)).double().eval()


def prompt_of(length: int) -> Tensor:
    return torch.randint(50, (length,), generator=torch.Generator().manual_seed(length))


def naive_greedy(model: GPT, prompt: Tensor, max_tokens: int) -> list[int]:
    """The whole context again for every token; when it would grow too long, its newer half goes on."""
    block_size = model.config.block_size
    ids, context = [], prompt.tolist()[-block_size:]
    for _ in range(max_tokens):
        if len(context) > block_size:
            context = context[-max(1, block_size // 2) :]
        token = int(model(torch.tensor([context]))[0, -1].argmax())
        ids.append(token)
        context = [*context, token]
    return ids


@pytest.mark.parametrize("length", [1, 5, 12, 30])
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 1}, GPT2, {"block_size": 11}, {"block_size": 1}, {"tie_embeddings": True}], ids=str
)
def test_greedy_equals_the_naive_loop(changes, length):
    model = build(**changes)
    got = generate(model, prompt_of(length), 40, **GREEDY)
    assert got == naive_greedy(model, prompt_of(length), 40)
    assert len(set(got)) > 5 or "tie_embeddings" in changes or "block_size" in changes


def test_same_seed_same_ids():
    model = build()
    runs = [generate(model, prompt_of(4), 30, temperature=1.0, top_k=None, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_seed_of_torch_is_not_touched():
    model = build(dropout=0.5)
    before = torch.get_rng_state()
    first = generate(model, prompt_of(4), 30, temperature=1.0, top_k=10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)  # nor does it matter
    assert generate(model, prompt_of(4), 30, temperature=1.0, top_k=10, seed=3) == first


def test_the_likeliest_token_alone_is_greedy():
    model = build()
    got = generate(model, prompt_of(4), 30, temperature=1.3, top_k=1, seed=7)
    assert got == generate(model, prompt_of(4), 30, **GREEDY)


def test_it_ends_before_the_stop_token():
    model = build()
    ids = generate(model, prompt_of(4), 30, **GREEDY)
    stop_id = ids[12]
    assert generate(model, prompt_of(4), 30, **GREEDY, stop_id=stop_id) == ids[: ids.index(stop_id)]
    never = next(token for token in range(50) if token not in ids)
    assert generate(model, prompt_of(4), 30, **GREEDY, stop_id=never) == ids


def test_no_tokens_wanted():
    assert generate(build(), prompt_of(4), 0, **GREEDY) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(training):
    model = build(dropout=0.5).train(training)
    expected = generate(build(dropout=0.5), prompt_of(4), 20, **GREEDY)
    assert generate(model, prompt_of(4), 20, **GREEDY) == expected  # without dropout
    assert all(module.training == training for module in model.modules())
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, torch.empty(0, dtype=torch.long), 5, **GREEDY)
    with pytest.raises(IndexError):
        generate(model, torch.tensor([10_000]), 5, **GREEDY)
    assert all(module.training == training for module in model.modules())


def test_generation_keeps_no_graph_and_no_gradient():
    model = build().train()
    generate(model, prompt_of(4), 5, **GREEDY)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 99)])
def test_samples_follow_the_distribution(temperature, top_k):
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0])
    expected = logits / temperature
    if top_k == 3:
        expected[[1, 4]] = float("-inf")
    expected = expected.softmax(dim=-1)
    n = 20_000
    drawn = sample(logits.expand(n, -1), temperature, top_k, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=5) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 4 * error).all()

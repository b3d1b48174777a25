"""Generation: the same tokens as without a cache, the same for a seed, and nothing else touched."""

import math

import pytest
import torch
from torch import Tensor

from gptlab import engine
from gptlab.engine import Engine, Request, generate
from gptlab.model import GPT, GPTConfig
from gptlab.sampling import Sampling

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


LOCAL = {"attention": "experiments.sliding_window.attention.SlidingWindowAttention", "block_size": 48}
NETWORKS = pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 1}, GPT2, LOCAL], ids=["own", "grouped", "gpt2", "local"]
)


def greedy(length: int, max_tokens: int, **changes) -> Request:
    settings = {"stop_ids": frozenset(), "slides": True, "sampling": Sampling(temperature=0)}
    return Request(prompt_of(length).tolist(), max_tokens, **settings | changes)


def finish(at_work: Engine) -> None:
    for _ in range(1000):
        if at_work.is_idle:
            return
        at_work.step()
    raise AssertionError("it does not end")


@NETWORKS
def test_many_at_a_time_equal_each_alone(changes):
    """Of any lengths, joining while others are under way, in fewer rows than requests, past the context too."""
    model = build(**changes)
    at_work, samples = Engine(model, rows=3), []
    wanted = [(1, 9), (5, 30), (12, 14), (3, 1), (30, 20), (7, 0), (2, 40), (11, 3)]
    for length, max_tokens in wanted:
        samples += at_work.add(greedy(length, max_tokens))
        at_work.step()
    finish(at_work)
    for (length, max_tokens), sample in zip(wanted, samples, strict=True):
        assert sample.ids == naive_greedy(model, prompt_of(length), max_tokens), length
        assert sample.finish_reason == "length"


def test_only_own_attention_is_computed_for_many_at_once():
    assert Engine(build(), rows=2).is_batched
    assert not Engine(build(**LOCAL), rows=2).is_batched


@NETWORKS
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(changes, piece, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", piece)
    model = build(**changes)
    (sample,) = (at_work := Engine(model)).add(greedy(10, 2, prompt_logprobs=True, logprobs=3))
    finish(at_work)
    whole = torch.tensor([prompt_of(10).tolist() + sample.ids])
    expected = model(whole)[0].log_softmax(-1)
    found = sample.prompt_logprobs + sample.logprobs
    assert [one.token for one in found] == whole[0].tolist()
    assert found[0].value is None
    for place, one in enumerate(found[1:]):
        assert one.value == pytest.approx(float(expected[place, one.token]), abs=1e-5)
        values, ids = expected[place].topk(3)
        assert [i for i, _ in one.likeliest] == ids.tolist()
        assert [value for _, value in one.likeliest] == pytest.approx(values.tolist(), abs=1e-5)


def test_samples_of_one_reading_are_those_of_requests_of_their_own():
    model, seeds = build(), (5, None)
    at_work = Engine(model, rows=3)
    drawn = at_work.add(greedy(4, 12, n=3, sampling=Sampling(seed=5)))
    finish(at_work)
    again = at_work.add(greedy(4, 12, n=3, sampling=Sampling(seed=5)))
    finish(at_work)
    assert [sample.ids for sample in drawn] == [sample.ids for sample in again]
    assert len({tuple(sample.ids) for sample in drawn}) == 3
    alone = generate(model, prompt_of(4), 12, temperature=1.0, top_k=None, seed=seeds[0])
    assert drawn[0].ids == alone


def test_a_full_context_is_the_end_where_it_does_not_slide():
    model = build()
    for rows in (1, 3):
        at_work = Engine(model, rows=rows)
        (sample,) = at_work.add(greedy(5, 40, slides=False))
        finish(at_work)
        assert sample.finish_reason == "length"
        assert sample.ids == naive_greedy(model, prompt_of(5), 8)  # 12 in all, and the one that follows
    with pytest.raises(ValueError, match="13 tokens does not fit into the context of 12"):
        at_work.add(greedy(13, 5, slides=False))


def test_what_is_cancelled_leaves_its_place_to_others():
    model = build()
    at_work = Engine(model, rows=2)
    first, second, third, fourth = (at_work.add(greedy(length, 30))[0] for length in (3, 4, 5, 6))
    for _ in range(6):
        at_work.step()
    at_work.cancel(first)
    at_work.cancel(fourth)  # which has not begun
    finish(at_work)
    assert first.ids == naive_greedy(model, prompt_of(3), 30)[: len(first.ids)]
    assert (first.finish_reason, fourth.finish_reason, fourth.ids) == ("stop", "stop", [])
    for sample, length in ((second, 4), (third, 5)):
        assert sample.ids == naive_greedy(model, prompt_of(length), 30)
    at_work.cancel(second)  # which has ended: nothing happens
    assert second.finish_reason == "length"


def test_what_is_read_can_be_cancelled(monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 2)
    at_work = Engine(build(), rows=2)
    (sample,) = at_work.add(greedy(9, 5))
    at_work.step()
    at_work.cancel(sample)
    assert at_work.is_idle
    (other,) = at_work.add(greedy(4, 5))
    finish(at_work)
    assert other.ids == naive_greedy(build(), prompt_of(4), 5)


def test_only_what_is_allowed_is_drawn():
    allowed = torch.zeros(50, dtype=torch.bool)
    allowed[[3, 7, 11]] = True
    (sample,) = (at_work := Engine(build())).add(
        greedy(4, 30, allowed=allowed, sampling=Sampling(seed=1, temperature=3))
    )
    finish(at_work)
    assert set(sample.ids) == {3, 7, 11}


def test_more_samples_than_rows_are_refused():
    with pytest.raises(ValueError, match="n=3 samples at a time are more than the 2"):
        Engine(build(), rows=2).add(greedy(4, 5, n=3))


def test_weights_that_are_not_finite_are_said():
    model = build()
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            generate(model, prompt_of(4), 5, temperature=temperature, top_k=None, seed=0)

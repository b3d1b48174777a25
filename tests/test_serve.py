"""The server as OpenAI's own client sees it: the same texts and figures as the network's own, streamed or whole."""

import asyncio
import json

import openai
import pytest
import torch
from kinds import of_kind
from serving import LETTERS, Served, serving, small

from gptlab.dialogue import prompt as dialogue_prompt
from gptlab.tokenizer import ByteTokenizer

GREEDY = {"model": "small", "prompt": "once upon", "max_tokens": 12, "temperature": 0}
TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def base():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def chatty():
    with serving(small(knows_turns=True)) as served:
        yield served


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


def model_logprobs(served: Served, ids: list[int]) -> torch.Tensor:
    """ln p of every token after each of `ids`, (T, V), by the network without a cache."""
    with torch.no_grad():
        return served.service.loaded.model(torch.tensor([ids]))[0].log_softmax(-1)


def ids_of(tokenizer, tokens: list[str]) -> list[int]:
    """The ids of tokens by their names in an answer, each a character or a special token."""
    special = tokenizer.special_tokens
    return [special.index(token) if token in special else int(tokenizer.encode(token)[0]) for token in tokens]


def test_models(base):
    (model,) = client(base).models.list().data
    assert (model.id, model.object, model.owned_by) == ("small", "model", "gptlab")
    assert client(base).models.retrieve("small") == model
    assert model.gptlab == {"knows_turns": False, "context": 64, "max_tokens": 4096}
    with pytest.raises(openai.NotFoundError) as error:
        client(base).models.retrieve("other/model")
    assert error.value.code == "model_not_found"


def test_a_completion_is_what_the_model_says_itself(base):
    done = client(base).completions.create(**GREEDY)
    assert done.object == "text_completion"
    assert done.choices[0].text == base.service.loaded.generate("once upon", 12, temperature=0)
    assert done.choices[0].finish_reason == "length"
    prompt_tokens = 1 + len("once upon")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (
        prompt_tokens,
        12,
        prompt_tokens + 12,
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stop": ["e", "zz"]},
        {"n": 3},
        {"echo": True, "logprobs": 2},
        {"prompt": ["a b", "c"], "n": 2, "logprobs": 0},
    ],
    ids=str,
)
def test_a_stream_says_what_a_whole_answer_says(base, more):
    asked = GREEDY | {"temperature": 0.9, "seed": 7} | more
    whole = client(base).completions.create(**asked)
    texts: dict[int, str] = {}
    logprobs: dict[int, list] = {}
    reasons: dict[int, str] = {}
    *chunks, last = client(base).completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == whole.usage
    for chunk in chunks:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        if choice.logprobs:
            rows = zip(*(getattr(choice.logprobs, name) for name in ROWS), strict=True)
            logprobs.setdefault(choice.index, []).extend(rows)
        assert choice.index not in reasons
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert reasons[choice.index] == choice.finish_reason
        if choice.logprobs:
            assert logprobs[choice.index] == list(zip(*(getattr(choice.logprobs, name) for name in ROWS), strict=True))
    assert len(whole.choices) == len(texts)
    if "n" in more:
        assert len(set(texts.values())) > 1


ROWS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def test_prompts_may_be_texts_or_ids_alone_or_in_lists(base):
    loaded = base.service.loaded
    ids = [loaded.prompt_ids(text) for text in ("once upon", "a b c")]
    expected = [loaded.generate(text, 12, temperature=0) for text in ("once upon", "a b c")]
    for prompt, texts in (
        (["once upon", "a b c"], expected),
        (ids, expected),
        (ids[1], expected[1:]),
        ([*ids, *ids, *ids, *ids, *ids], expected * 5),  # more than run at a time
    ):
        done = client(base).completions.create(**GREEDY | {"prompt": prompt})
        assert [choice.text for choice in done.choices] == texts
        assert [choice.index for choice in done.choices] == list(range(len(texts)))


def test_a_stop_string_ends_the_text_before_it(base):
    text = base.service.loaded.generate("once upon", 30, temperature=0)
    for stop in (text[5:7], [text[9:12], "never, never"]):
        done = client(base).completions.create(**GREEDY | {"max_tokens": 30, "stop": stop, "logprobs": 0})
        (choice,) = done.choices
        first = text.index(stop if isinstance(stop, str) else stop[0])
        assert (choice.text, choice.finish_reason) == (text[:first], "stop")
        assert base.service.loaded.tokenizer.decode(ids_of(LETTERS, choice.logprobs.tokens)) == text[:first]


def test_the_same_seed_says_the_same_and_another_something_else(base):
    said = [
        client(base).completions.create(**GREEDY | {"temperature": 1.0, "max_tokens": 30, "seed": seed}).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]


def test_log_probabilities_are_the_network_s_own(base):
    done = client(base).completions.create(**GREEDY | {"echo": True, "logprobs": 3, "temperature": 1.0, "seed": 3})
    (choice,) = done.choices
    loaded, logprobs = base.service.loaded, choice.logprobs
    assert choice.text.startswith("once upon")
    ids = ids_of(loaded.tokenizer, logprobs.tokens)
    assert ids[:10] == loaded.prompt_ids("once upon")
    assert loaded.tokenizer.decode(ids) == choice.text
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    expected = model_logprobs(base, ids)
    for place, token in enumerate(ids[1:]):
        row = expected[place]
        assert logprobs.token_logprobs[place + 1] == pytest.approx(float(row[token]), abs=1e-4)
        top = logprobs.top_logprobs[place + 1]
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert len(top) in (3, 4)
        said = loaded.tokenizer.decode([token])
        assert choice.text[logprobs.text_offset[place + 1] :].startswith(said)


def test_a_text_is_scored_without_a_word_more(base):
    ids = base.service.loaded.prompt_ids("some text to score")
    done = client(base).completions.create(
        model="small", prompt=ids, max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    expected = model_logprobs(base, ids)[range(len(ids) - 1), ids[1:]]
    assert done.choices[0].text == "some text to score"
    assert done.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (0, "length")


@pytest.mark.parametrize("kind", ["byte", "bpe", "hf"])
def test_no_half_character_is_shown_by_any_tokenizer(kind):
    tokenizer = ByteTokenizer() if kind == "byte" else of_kind(kind)
    loaded = small(tokenizer, block_size=128)
    asked = {"prompt": "¿quién? ", "max_tokens": 60, "seed": 5, "logprobs": 1, "echo": True}
    with serving(loaded) as served:
        _, whole = served.post("/v1/completions", asked)
        events = served.events("/v1/completions", asked)
    (choice,) = whole["choices"]
    assert choice["text"] == "¿quién? " + loaded.generate("¿quién? ", 60, temperature=1.0, seed=5)
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    offsets = [at for event in events for at in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == choice["logprobs"]["text_offset"] == sorted(offsets)
    for token, at in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        if not token.startswith("bytes:") and token not in tokenizer.special_tokens:
            assert token in choice["text"][at : at + 3 + len(token)]  # after what an unfinished character comes to


def test_past_the_context_only_on_request(base):
    asked = {"prompt": "long " * 10, "max_tokens": 40, "temperature": 0}
    status, answer = base.post("/v1/completions", asked)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "at most 14" in answer["error"]["message"]
    assert base.post("/v1/completions", asked | {"max_tokens": 14})[0] == 200
    _, answer = base.post("/v1/completions", asked | {"truncation": "auto"})
    assert answer["choices"][0]["text"] == base.service.loaded.generate("long " * 10, 40, temperature=0)
    status, answer = base.post("/v1/completions", asked | {"prompt": "long " * 13, "max_tokens": 1})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    _, answer = base.post("/v1/completions", asked | {"prompt": "long " * 99, "truncation": "auto"})
    assert answer["usage"] == {"prompt_tokens": 64, "completion_tokens": 40, "total_tokens": 104}


def test_a_base_model_says_that_it_knows_no_turns(base):
    with pytest.raises(openai.BadRequestError) as error:
        client(base).chat.completions.create(model="small", messages=TURNS)
    assert "/v1/completions" in error.value.message


def test_a_chat_answers_what_its_own_template_asks(chatty):
    loaded = chatty.service.loaded
    done = client(chatty).chat.completions.create(
        model="small", messages=TURNS, max_tokens=15, temperature=0, logprobs=True, top_logprobs=2
    )
    ids, _ = dialogue_prompt(loaded.tokenizer, TURNS, 64)
    (choice,) = done.choices
    assert done.object == "chat.completion"
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert done.usage.prompt_tokens == len(ids)
    answer = ids_of(loaded.tokenizer, [told.token for told in choice.logprobs.content])
    assert loaded.tokenizer.decode(answer) == choice.message.content
    expected = model_logprobs(chatty, ids + answer)
    assert len(answer) == 15
    for place, (token, told) in enumerate(zip(answer, choice.logprobs.content, strict=True), start=len(ids) - 1):
        assert token == int(expected[place].argmax())
        assert told.logprob == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert bytes(told.bytes).decode() == loaded.tokenizer.decode([token])
        assert [one.logprob for one in told.top_logprobs] == pytest.approx(
            expected[place].topk(2).values.tolist(), abs=1e-4
        )


def test_a_chat_s_stream_begins_with_the_role_and_ends_with_the_usage(chatty):
    asked = {"model": "small", "messages": TURNS, "max_completion_tokens": 15, "seed": 3, "n": 2}
    whole = client(chatty).chat.completions.create(**asked)
    *chunks, last = client(chatty).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == whole.usage
    assert {chunk.id for chunk in chunks} == {last.id}
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_a_chat_may_be_written_in_parts_and_by_a_developer(chatty):
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    written = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    asked = {"temperature": 0, "max_tokens": 10}
    _, plain = chatty.post("/v1/chat/completions", asked | {"messages": TURNS})
    _, other = chatty.post("/v1/chat/completions", asked | {"messages": written})
    assert plain["choices"] == other["choices"]


def test_a_long_chat_loses_its_oldest_turns_only_on_request(chatty):
    turns = [TURNS[0]]
    for _ in range(5):
        turns += [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]
    asked = {"messages": [*turns, {"role": "user", "content": "bye"}], "max_tokens": 8, "temperature": 0}
    status, answer = chatty.post("/v1/chat/completions", asked)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    status, answer = chatty.post("/v1/chat/completions", asked | {"truncation": "auto"})
    assert status == 200
    kept, dropped = dialogue_prompt(chatty.service.loaded.tokenizer, asked["messages"], 64 - 8)
    assert dropped
    assert answer["usage"]["prompt_tokens"] == len(kept)


def test_many_at_a_time_say_what_each_says_alone(base):
    prompts = [f"{'abcdefgh'[i % 8]} tale number {'xyz'[i % 3]}" for i in range(24)]
    alone = [base.service.loaded.generate(prompt, 25, temperature=0) for prompt in prompts]

    async def together() -> list[str]:
        asker = openai.AsyncOpenAI(base_url=base.url, api_key="none", max_retries=0)
        asked = [asker.completions.create(**GREEDY | {"prompt": prompt, "max_tokens": 25}) for prompt in prompts]
        return [done.choices[0].text for done in await asyncio.gather(*asked)]

    assert asyncio.run(together()) == alone
    base.until_idle()


def test_metrics_count_what_was_done():
    with serving() as served:
        assert served.ask("GET", "/health")[0] == 200
        done = client(served).completions.create(**GREEDY)
        served.ask("GET", "/no/such")
        status, headers, content = served.ask("GET", "/metrics")
        health = json.loads(served.ask("GET", "/health")[2])
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = content.decode().splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert found['gptlab_requests_total{path="/v1/completions",status="200"}'] == "1"
    assert found['gptlab_requests_total{path="other",status="404"}'] == "1"
    assert int(found["gptlab_prompt_tokens_total"]) == done.usage.prompt_tokens
    assert int(found["gptlab_completion_tokens_total"]) == 12
    assert found['gptlab_first_token_seconds_bucket{le="+Inf"}'] == "1"
    assert float(found["process_resident_memory_bytes"]) > 1e7
    assert {line.split()[2] for line in lines if line.startswith("# TYPE")} >= {"gptlab_samples_active"}
    assert health == {"status": "ok", "active": 0, "waiting": 0}

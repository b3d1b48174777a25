"""Who is let in and how much of it, who waits, who is sent away, and that nobody keeps a place who has left."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import torch
from serving import LETTERS, serving, small

from gptlab.safety import Safety
from gptlab.sampling import NOT_FINITE
from gptlab.serve import limits as limits_module
from gptlab.serve import service as service_module
from gptlab.serve.__main__ import key_of, listen
from gptlab.serve.limits import Limits, is_loopback, name_of, require_key

ASKED = {"prompt": "once", "max_tokens": 5}
LONG = {"prompt": "once", "max_tokens": 50, "temperature": 0}


@pytest.fixture(scope="module")
def base():
    with serving(max_tokens=60, max_body_kb=16) as served:
        yield served


@pytest.fixture(scope="module")
def chatty():
    with serving(small(knows_turns=True)) as served:
        yield served


def error_of(answer: tuple[int, dict]) -> tuple[int, str | None, str | None]:
    """Status, param and code, of an answer in the shape of OpenAI's errors."""
    status, content = answer
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["message"]
    assert content["error"]["type"] == (
        "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    )
    return status, content["error"]["param"], content["error"]["code"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "gpt-5"}, "model", "model_not_found"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [10**30]}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 300}, "prompt", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 61}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5.5}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 10**400}, "top_p", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_k": 0}, "top_k", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "invalid_value"),
        ({"truncation": "left"}, "truncation", "invalid_value"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"presence_penalty": -1}, "presence_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 10}}, "logit_bias", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(base, fields, param, code):
    answer = base.post("/v1/completions", ASKED | fields)
    assert error_of(answer) == (404 if code == "model_not_found" else 400, param, code)
    assert param in answer[1]["error"]["message"] or param == "prompt" or code == "model_not_found"
    assert len(answer[1]["error"]["message"]) < 500
    if param == "temprature":
        assert "'temperature'" in answer[1]["error"]["message"]
    base.until_idle()  # no place is kept for it


def test_what_changes_nothing_is_taken(base, chatty):
    common = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "n": None, "stop": None}
    _, plain = base.post("/v1/completions", LONG | {"max_tokens": 9})
    status, answer = base.post("/v1/completions", LONG | {"max_tokens": 9, "best_of": 1, "suffix": None} | common)
    assert (status, answer["choices"]) == (200, plain["choices"])
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False, "metadata": {}}
    asked = {"messages": [{"role": "user", "content": "hi", "name": None}], "max_tokens": 5}
    assert chatty.post("/v1/chat/completions", asked | common | neutral)[0] == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens", None),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"max_completion_tokens": 60}, "max_completion_tokens", "context_length_exceeded"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0]", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "hi", "name": "Ann"}]}, "messages[0]", "unsupported_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "messages",
            "invalid_value",
        ),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_chat_is_named(chatty, fields, param, code):
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    assert error_of(chatty.post("/v1/chat/completions", asked | fields)) == (400, param, code)
    chatty.until_idle()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 9000,
        b'{"a":"\\ud800"}',
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(base, body):
    assert error_of(base.post("/v1/completions", body)) == (400, None, "invalid_json")


def test_unknown_addresses_and_methods(base):
    assert error_of(base.post("/v1/embeddings", {})) == (404, None, "unknown_url")
    assert error_of(base.post("/v1/responses", {})) == (404, None, "unknown_url")
    status, headers, content = base.ask("GET", "/v1/completions")
    assert error_of((status, json.loads(content))) == (405, None, "method_not_allowed")
    assert headers["allow"] == "POST"
    assert headers["x-request-id"].startswith("req_")
    assert error_of(base.post("/v1/completions", ASKED, Content_Type="text/plain"))[0] == 415


def test_a_body_past_the_limit_is_a_413_declared_or_not(base):
    asked = json.dumps(ASKED | {"user": "x" * 17_000}).encode()
    assert error_of(base.post("/v1/completions", asked)) == (413, None, "body_too_large")
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", base.port), timeout=10) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(20):
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", base.port), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {10**15}\r\n\r\n".encode())  # answered without reading all of it
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert base.post("/v1/completions", ASKED)[0] == 200


def test_a_body_that_does_not_come_is_given_up(base, monkeypatch):
    monkeypatch.setattr(limits_module, "BODY_TIMEOUT_S", 0.1)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", base.port), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_key_is_asked_for_everywhere_but_at_the_page():
    with serving(key="sesame") as served:
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            for given in (
                {},
                {"Authorization": "Bearer"},
                {"Authorization": "Bearer sesam"},
                {"Authorization": "sesame"},
            ):
                status, headers, content = served.ask("GET", path, **given)
                assert error_of((status, json.loads(content))) == (401, None, "invalid_api_key")
                assert headers["www-authenticate"] == "Bearer"
        assert served.ask("GET", "/v1/models", Authorization="bearer sesame")[0] == 200
        assert served.ask("GET", "/health")[0] == served.ask("GET", "/")[0] == 200
        assert served.ask("GET", "/health", Host="example.org")[0] == 200
        asker = openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            asker.models.list()
        assert asker.with_options(api_key="sesame").models.list().data[0].id == "small"


def test_without_a_key_a_page_of_another_name_is_sent_away(base):
    for host, status in (("evil.example", 403), ("evil.example:8000", 403), ("localhost:1", 200), ("[::1]:80", 200)):
        assert base.ask("GET", "/v1/models", Host=host)[0] == status
    assert error_of(base.post("/v1/completions", ASKED, Host="evil.example")) == (403, None, "forbidden_host")
    assert [name_of(host) for host in ("A.b:80", "a", "[::1]", "::1")] == ["a.b", "a", "::1", "::1"]


def test_a_public_address_needs_a_key():
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    require_key("0.0.0.0", "sesame")
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ValueError, match="GPTLAB_API_KEY"):
            require_key(host, None)
    with pytest.raises(ValueError, match="no address"):
        is_loopback("no.such.host.invalid")


def test_keys_and_ports_that_cannot_be(monkeypatch):
    monkeypatch.setenv("GPTLAB_API_KEY", "from-the-environment")
    assert key_of(SimpleNamespace(api_key=None)) == "from-the-environment"
    assert key_of(SimpleNamespace(api_key="given")) == "given"
    for key in ("", " ", "a\nb", "schlüssel"):
        with pytest.raises(ValueError, match="key"):
            key_of(SimpleNamespace(api_key=key))
    monkeypatch.setenv("GPTLAB_API_KEY", "")
    assert key_of(SimpleNamespace(api_key=None)) is None
    with pytest.raises(ValueError, match="--port 70000"):
        listen("127.0.0.1", 70000)
    with listen("127.0.0.1", 0) as taken, pytest.raises(ValueError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"parallel": 0}, "--parallel 0"), ({"queue": -1}, "--queue -1"), ({"timeout_s": 0.0}, "--timeout 0.0")],
)
def test_limits_that_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        Limits(**fields)


def test_who_finds_no_place_is_told_so_at_once_and_when_to_come_again():
    with serving(parallel=1, queue=1) as served:
        served.slow_down(0.005)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: served.ask("POST", "/v1/completions", LONG | {"stream": True}), range(8)))
        assert sorted(status for status, _, _ in answers) == [200, 200, *[429] * 6]
        for status, headers, content in answers:
            if status == 429:
                assert error_of((status, json.loads(content))) == (429, None, "queue_full")
                assert 1 <= int(headers["retry-after"]) <= 60
            else:
                assert content.endswith(b"data: [DONE]\n\n")
        served.until_idle()
        assert served.post("/v1/completions", ASKED)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_a_client_that_leaves_frees_its_place(stream, waits):
    endless = LONG | {"max_tokens": 4000, "truncation": "auto", "stream": stream}
    with serving(parallel=1) as served:
        served.slow_down(0.005)
        others = [served.open(endless)] if waits else []
        time.sleep(0.1)
        leaving = served.open(endless)
        time.sleep(0.1)
        leaving.close()
        end = time.monotonic() + 5
        while served.service.admission.here > len(others):
            assert time.monotonic() < end
            time.sleep(0.01)
        for other in others:
            other.close()
        served.until_idle()
        assert served.service.metrics.counts["gptlab_cancelled_total"] == 1 + len(others)
        assert served.post("/v1/completions", ASKED)[0] == 200


def test_a_reader_who_does_not_read_holds_up_nobody():
    with serving(parallel=1, buffer_bytes=4096) as served:
        slow = served.open(LONG | {"max_tokens": 500, "truncation": "auto", "stream": True, "logprobs": 20})
        assert served.post("/v1/completions", ASKED)[0] == 200
        served.until_idle(30)  # all of the other one's text is there, unread
        assert served.service.metrics.counts["gptlab_completion_tokens_total"] >= 500
        said = b""
        while b"[DONE]" not in said:
            said = said[-20:] + slow.recv(2**16)
        slow.close()


def test_a_reader_who_never_reads_is_left(monkeypatch):
    monkeypatch.setattr(service_module, "SEND_TIMEOUT_S", 0.3)
    body = LONG | {"max_tokens": 3000, "truncation": "auto", "stream": True, "logprobs": 20}
    with serving(buffer_bytes=4096) as served:
        held = served.open(body)
        end = time.monotonic() + 20
        while not served.service.metrics.requests["/v1/completions", 200]:  # counted when it is over
            assert time.monotonic() < end
            time.sleep(0.05)
        said = b""
        while piece := held.recv(2**16):
            said += piece
        assert b"[DONE]" not in said
        assert said.startswith(b"HTTP/1.1 200")
        served.until_idle()
        held.close()


@pytest.mark.parametrize("stream", [True, False])
def test_time_is_limited(stream):
    with serving(timeout_s=0.2, parallel=1) as served:
        served.slow_down(0.02)
        status, headers, content = served.ask("POST", "/v1/completions", LONG | {"stream": stream})
        if stream:
            *_, last, rest = content.decode().split("\n\n")
            assert rest == ""
            assert error_of((504, json.loads(last.removeprefix("data: ")))) == (504, None, "timeout")
        else:
            assert error_of((status, json.loads(content))) == (504, None, "timeout")
            assert headers["x-should-retry"] == "false"
        served.until_idle()
        assert served.service.metrics.counts["gptlab_timeouts_total"] == 1


def test_an_error_in_one_request_is_no_other_s():
    with serving() as served:
        engine, bad = served.service.worker.engine, LETTERS.encode("z")[0]
        draw = engine._draw

        def fragile(sample, logits):
            if bad in sample.request.prompt and len(sample.ids) >= 3:
                logits = torch.full_like(logits, torch.nan)
            return draw(sample, logits)

        engine._draw = fragile
        served.slow_down(0.002)
        with ThreadPoolExecutor(6) as pool:
            asked = [LONG | {"prompt": f"{letter} tale", "stream": False} for letter in "abzcde"]
            answers = list(pool.map(lambda body: served.post("/v1/completions", body), asked))
        for letter, (status, answer) in zip("abzcde", answers, strict=True):
            if letter == "z":
                assert error_of((status, answer)) == (500, None, "generation_failed")
                assert answer["error"]["message"] == NOT_FINITE
            else:
                loaded = served.service.loaded
                assert answer["choices"][0]["text"] == loaded.generate(f"{letter} tale", 50, temperature=0)
        *events, last, _ = served.ask("POST", "/v1/completions", LONG | {"prompt": "z", "stream": True})[2].split(
            b"\n\n"
        )
        assert events
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "generation_failed"
        served.until_idle()


def test_a_nan_in_one_s_cache_reaches_no_other():
    loaded = small()
    with torch.no_grad():
        loaded.model.embed.weight[LETTERS.encode("z")[0]] = torch.nan
    with serving(loaded, parallel=2) as served:
        alone = [
            loaded.generate(prompt, 15, temperature=0) for prompt in ("a", "a long tale of many words in a row, b")
        ]
        for _ in range(2):
            status, answer = served.post("/v1/completions", LONG | {"prompt": "z" * 50, "max_tokens": 5})
            assert error_of((status, answer)) == (500, None, "generation_failed")
            prompts = ["a", "a long tale of many words in a row, b"]
            _, answer = served.post("/v1/completions", LONG | {"prompt": prompts, "max_tokens": 15})
            assert [choice["text"] for choice in answer["choices"]] == alone


def test_a_network_of_nans_serves_errors_and_stays():
    loaded = small()
    with torch.no_grad():
        loaded.model.embed.weight.fill_(torch.nan)
    with serving(loaded) as served:
        for more in ({}, {"stream": True}, {"n": 3}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
            status, _, content = served.ask("POST", "/v1/completions", ASKED | more)
            assert error_of((status, json.loads(content))) == (500, None, "generation_failed")
        served.until_idle()
        assert served.ask("GET", "/health")[0] == 200


def test_an_engine_that_fails_altogether_begins_anew():
    with serving() as served:
        served.service.worker.engine.step = lambda: 1 / 0
        status, answer = served.post("/v1/completions", ASKED)
        assert error_of((status, answer)) == (500, None, "generation_failed")
        assert "division" not in answer["error"]["message"]
        assert served.post("/v1/completions", ASKED)[0] == 200


def test_what_is_under_way_when_the_server_ends_is_told():
    with serving(parallel=1) as served:
        served.slow_down(0.01)
        answers = []
        bodies = [LONG | {"stream": True}, LONG]
        threads = [
            threading.Thread(target=lambda body=body: answers.append(served.ask("POST", "/v1/completions", body)))
            for body in bodies
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        served.service.stop()
        for thread in threads:
            thread.join(10)
        assert {status for status, _, _ in answers} == {200, 503}
        assert all(b'"code":"unavailable"' in content for _, _, content in answers)
        assert error_of(served.post("/v1/completions", ASKED)) == (503, None, "unavailable")
        assert served.ask("GET", "/health")[0] == 503


def test_the_filter_applies_to_every_request(tmp_path):
    blocklist = tmp_path / "words.txt"
    text = small(knows_turns=True).generate("once", 40, temperature=0)
    word = max(text.replace(".", " ").replace(",", " ").split(), key=len)
    blocklist.write_text(f"{word}\nforbidden fruit\n")
    with serving(small(knows_turns=True), Safety.of("strict", blocklist)) as served:
        for stream in (True, False):
            asked = {"prompt": "once", "max_tokens": 40, "temperature": 0}
            if stream:
                choices = [event["choices"][0] for event in served.events("/v1/completions", asked)]
            else:
                choices = served.post("/v1/completions", asked)[1]["choices"]
            assert "".join(choice["text"] for choice in choices) == text[: text.index(word)]
            assert choices[-1]["finish_reason"] == "content_filter"
        _, answer = served.post("/v1/completions", {"prompt": ["a", "Forbidden  fruit", "b"], "max_tokens": 3})
        filtered = [choice["finish_reason"] == "content_filter" for choice in answer["choices"]]
        assert filtered == [False, True, False]
        assert [len(choice["text"]) > 0 for choice in answer["choices"]] == [True, False, True]
        ids = LETTERS.encode("a forbidden fruit").tolist()
        _, answer = served.post("/v1/completions", {"prompt": ids, "max_tokens": 3})
        assert answer["choices"][0]["finish_reason"] == "content_filter"
        turns = [{"role": "user", "content": "forbidden fruit"}]
        _, answer = served.post("/v1/chat/completions", {"messages": turns, "max_tokens": 3})
        assert answer["choices"][0]["finish_reason"] == "content_filter"
        mark = LETTERS.special_id("<|assistant|>")
        assert error_of(served.post("/v1/completions", {"prompt": [2, mark], "max_tokens": 3}))[0] == 400
        assert error_of(served.post("/v1/completions", {"prompt": "a", "max_tokens": 1025}))[0] == 400
        assert error_of(served.post("/v1/completions", {"prompt": "a" * 40_000, "max_tokens": 5}))[0] == 400
        served.until_idle()

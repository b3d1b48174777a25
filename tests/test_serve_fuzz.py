"""Whatever a body says, the answer is one of the documented kind, and never a failure of the server."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import serving, small

from gptlab.serve.schema import Chat, Completion

FIELDS = sorted({*Completion.model_fields, *Completion.neutral, *Chat.model_fields, *Chat.neutral})
SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars | st.integers(-3, 50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# Near to what is asked for, so that some of it comes through.
roles = st.sampled_from(["system", "user", "assistant", "developer", "tool"])
message = st.fixed_dictionaries({"role": roles | anything, "content": st.text(max_size=12) | anything})
near = {
    "prompt": st.text(max_size=30)
    | st.lists(st.integers(-1, 60), max_size=9)
    | st.lists(st.text(max_size=5), max_size=3),
    "messages": st.lists(message, max_size=4),
    "max_tokens": st.integers(-1, 20),
    "max_completion_tokens": st.integers(-1, 20),
    "n": st.integers(0, 9),
    "temperature": st.floats(-0.1, 3),
    "top_p": st.floats(0, 1.1),
    "top_k": st.integers(0, 50),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 3),
    "seed": st.integers(-(2**63), 2**64),
    "stream": st.booleans(),
    "stop": st.text(max_size=2) | st.lists(st.text(max_size=3), max_size=3),
    "logprobs": st.integers(-1, 21) | st.booleans(),
    "echo": st.booleans(),
    "truncation": st.sampled_from(["auto", "disabled"]),
}
one_field = st.sampled_from(FIELDS).flatmap(lambda name: st.tuples(st.just(name), near.get(name, anything) | anything))
body = st.lists(one_field, max_size=5).map(dict) | st.dictionaries(st.text(max_size=8), anything, max_size=3)


@pytest.fixture(scope="module")
def served():
    with serving(small(knows_turns=True), max_tokens=30) as served:
        yield served


def check(served, path: str, content: bytes) -> None:
    status, headers, answer = served.ask("POST", path, content)
    assert status in (200, 400, 404), (status, answer)
    if status != 200:
        error = json.loads(answer)["error"]
        assert error["message"]
        assert len(error["message"]) < 1000
        return
    if headers["content-type"].startswith("text/event-stream"):
        assert answer.endswith(b"data: [DONE]\n\n"), answer
    else:
        assert json.loads(answer)["usage"]["completion_tokens"] <= 30 * 256


@settings(max_examples=120, **SETTINGS)
@given(body, st.booleans())
def test_fuzzed_bodies_never_give_a_500(served, fields, is_chat):
    least = {"messages": [{"role": "user", "content": "a"}]} if is_chat else {"prompt": "a", "max_tokens": 4}
    content = json.dumps(least | fields).encode()
    check(served, "/v1/chat/completions" if is_chat else "/v1/completions", content)
    served.until_idle()


@settings(max_examples=40, **SETTINGS)
@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
def test_garbage_never_gives_a_500(served, content):
    check(served, "/v1/completions", content)


@pytest.mark.slow
@settings(max_examples=3000, **SETTINGS)
@given(body, st.booleans())
def test_thousands_of_fuzzed_bodies_never_give_a_500(served, fields, is_chat):
    test_fuzzed_bodies_never_give_a_500.hypothesis.inner_test(served, fields, is_chat)

"""Text on its way out: nothing that has to be taken back, and nothing that is blocked."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlab.engine import Request, Sample
from gptlab.safety import MAX_TOKENS, Safety
from gptlab.texts import Guarded, Output, TextStream
from gptlab.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
TEXTS = st.text(alphabet="abñ語🙂 .", max_size=40)
STOPS = st.lists(st.text(alphabet="abñ語🙂 .", min_size=1, max_size=4), max_size=3)


@given(TEXTS, STOPS)
def test_all_up_to_the_first_stop_and_each_piece_for_good(text, stop):
    stream, shown = TextStream(BYTES, stop), ""
    for token in BYTES.encode(text).tolist():
        shown += stream.add(token)
        assert "\ufffd" not in shown
        assert not any(one in shown for one in stop)
    shown += stream.end()
    # the stop that is complete first; of those that end together, the one that begins first
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    assert stream.stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_what_cannot_become_a_stop_is_shown_at_once():
    stream = TextStream(BYTES, ["STOP"])
    assert [stream.add(token) for token in BYTES.encode("xSTxSTOx").tolist()] == [
        "x",
        "",
        "",
        "STx",
        "",
        "",
        "",
        "STOx",
    ]


def test_half_a_character_at_the_end_is_seen():
    stream = TextStream(BYTES)
    assert [stream.add(token) for token in BYTES.encode("ñ").tolist()[:1]] == [""]
    assert stream.end() == "\ufffd"


def test_a_stop_of_nothing_is_refused():
    with pytest.raises(ValueError, match="stop='' is nothing"):
        TextStream(BYTES, [""])


def of_words(tmp_path, *phrases: str) -> Safety:
    (tmp_path / "blocked.txt").write_text("\n".join(phrases) + "\n\n")
    return Safety.of("strict", tmp_path / "blocked.txt")


@given(st.text(alphabet="ab b.", max_size=60), st.integers(1, 5))
def test_nothing_blocked_is_shown_and_nothing_else_is_lost(tmp_path_factory, text, size):
    safety = Safety("strict", re.compile(r"(?<!\w)(?:ab|b\s{1,3}a)(?!\w)", re.IGNORECASE), 5)
    guard, shown = Guarded(safety), ""
    for start in range(0, len(text), size):
        shown += guard.add(text[start : start + size])
        assert not safety.blocks(shown)
    shown += guard.add("", final=True)
    match = safety.blocked.search(text)
    assert guard.tripped == bool(match)
    assert shown == (text[: match.start()] if match else text)


def test_phrases_are_whole_words_in_any_case_and_spacing(tmp_path):
    safety = of_words(tmp_path, "red fox", "c++")
    for text in ("a Red  FOX!", "red\nfox", "C++"):
        assert safety.blocks(text), text
    for text in ("red foxes", "scared fox", "infrared fox", "fox red"):
        assert not safety.blocks(text), text


def grown(ids: list[int], reason: str | None = None) -> Sample:
    sample = Sample(Request([2], 1000), 0)
    sample.ids, sample.finish_reason = ids, reason
    return sample


def test_a_loop_ends_a_strict_sample_alone():
    ids = BYTES.encode("la " * 40).tolist()
    for mode, reason in (("strict", "content_filter"), ("standard", None), ("off", None)):
        output = Output(BYTES, (), Safety(mode))
        output.take(grown(ids))
        assert output.finish_reason == reason
    output = Output(BYTES, (), Safety("strict"))
    output.take(
        grown(BYTES.encode("The cat sat on the mat, and the dog looked at it for a long, long while.").tolist())
    )
    assert output.finish_reason is None


def test_a_stop_says_more_than_a_length(tmp_path):
    output = Output(BYTES, ["mat"])
    assert output.take(grown(BYTES.encode("a mat").tolist(), "length")) == "a "
    assert output.finish_reason == "stop"
    assert output.take(grown(BYTES.encode("a mat or two").tolist())) == ""
    output = Output(BYTES, ["mat"], of_words(tmp_path, "cat"))
    assert output.take(grown(BYTES.encode("the cat").tolist(), "length")) == "the "
    assert (output.finish_reason, output.text) == ("content_filter", "the ")


def test_modes_differ_in_what_may_be_drawn():
    assert Safety("off").allowed(BYTES, frozenset([2])) is None
    allowed = Safety("standard").allowed(BYTES, frozenset([2]))
    assert allowed[:13].tolist() == [i == 2 for i in range(13)]
    assert allowed[13:].all()
    assert Safety("standard").max_tokens(10**6) == 10**6
    assert Safety("strict").max_tokens(10**6) == MAX_TOKENS


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(ValueError, match="safety_mode='strickt' is none of off, standard, strict"):
        Safety("strickt")
    with pytest.raises(ValueError, match="a blocklist goes with safety_mode=strict, not off"):
        of_words(tmp_path, "x") and Safety.of("off", tmp_path / "blocked.txt")
    with pytest.raises(ValueError, match=r"none\.txt"):
        Safety.of("strict", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no phrase"):
        Safety.of("strict", tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="takes prompts of 32768 characters, not 40000"):
        Safety("strict").require_prompt("x" * 40_000)

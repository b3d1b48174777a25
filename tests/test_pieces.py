"""Encoding word by word gives what sentencepiece makes of the whole text, or is not done."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import prose
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab import pieces
from gptlab.pieces import SPACE, WORDS, Words
from gptlab.tokenizer import SentencePieceTokenizer

CODE = "".join(f"def f_{i}(x: int = {i * 37}) -> None:\n    return x**{i % 7}  # it's ok\n\n\n" for i in range(300))
SPANISH = "¿Qué añades, niño? «Nada», dijo él; y se fue a por 1.234,5 €. Ζεύς и Волга, 東京タワー.\n" * 40
TEXT = prose(3000) + CODE + SPANISH
# Code points, runs of spaces and line ends, and words of the text, in any order
texts = st.lists(st.one_of(st.text(), st.sampled_from(["  ", " ", "\n", "\t\n", *TEXT.split()]))).map("".join)


def tokenizer(domain_tokens: list[str] | None = None, model_type: str = "bpe", vocab_size: int = 600):
    return SentencePieceTokenizer.train(
        [TEXT],
        vocab_size=vocab_size,
        model_type=model_type,
        character_coverage=0.9997,
        max_train_bytes=10**6,
        domain_tokens=domain_tokens,
    )


BY_WORDS, BY_SPACES = tokenizer(), tokenizer(["->", "x**"])


def used(made: SentencePieceTokenizer) -> Words | None:
    return getattr(made._ids, "__self__", None)


def test_which_words_fit_which_vocabulary():
    assert used(BY_WORDS).pattern is WORDS[0]
    assert used(BY_SPACES).pattern is WORDS[1]
    assert used(tokenizer(["the cat"])) is None
    assert used(tokenizer(model_type="unigram", vocab_size=380)) is None
    assert used(SentencePieceTokenizer(BY_WORDS.model)) is None  # made elsewhere, for all that it says


@pytest.mark.parametrize("made", [BY_WORDS, BY_SPACES], ids=["words", "spaces"])
@settings(deadline=None, max_examples=400)
@given(text=texts)
def test_ids_are_those_of_the_whole_text(made, text):
    text = text.replace(SPACE, "").encode("utf-8", "ignore").decode()
    assert made.encode(text).tolist() == made._processor.encode(text)
    assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize("made", [BY_WORDS, BY_SPACES], ids=["words", "spaces"])
def test_words_of_long_text_are_forgotten_and_ids_stay(made, monkeypatch):
    whole = np.array(made._processor.encode(TEXT))
    assert np.array_equal(made.encode(TEXT), whole)
    monkeypatch.setattr(pieces, "MOST_CHARACTERS", 100)
    for _ in range(3):
        assert np.array_equal(made.encode(TEXT), whole)
    assert np.array_equal(np.concatenate([made.encode("a" * 200), made.encode(" b")]), made.encode("a" * 200 + " b"))
    assert set(used(made).known) == set(used(made).pattern.findall("a" * 200 + " b"))


def test_threads_may_share_it(monkeypatch):
    monkeypatch.setattr(pieces, "MOST_CHARACTERS", 500)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    parts = [TEXT[start : start + 700] for start in range(0, 42_000, 700)]
    expected = [BY_WORDS._processor.encode(part) for part in parts]
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                assert [ids.tolist() for ids in pool.map(BY_WORDS.encode, parts)] == expected
    finally:
        sys.setswitchinterval(before)

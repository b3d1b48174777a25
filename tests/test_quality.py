"""What is told of texts: copies to the byte, as a search through everything finds them, and figures one can count."""

import random

import numpy as np
import pytest
from conftest import prose
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.data.tokens import TokenFile
from gptlab.evaluate import copies as copies_module
from gptlab.evaluate.copies import LEAST, SPAN, Copies
from gptlab.evaluate.quality import (
    distinct,
    document_starts,
    excerpts,
    longest_repeat,
    quality,
    training_text,
    words_seen,
)
from gptlab.tokenizer import EOS_ID, ByteTokenizer


def searched(text: bytes, training: bytes) -> tuple[int, float | None]:
    """The longest span of `text` in `training`, and the share of its spans of SPAN bytes, by looking for every one."""
    longest = 0
    for start in range(len(text)):
        while start + longest < len(text) and text[start : start + longest + 1] in training:
            longest += 1
    spans = [text[start : start + SPAN] in training for start in range(len(text) - SPAN + 1)]
    return (longest if longest >= LEAST else 0), (sum(spans) / len(spans) if spans else None)


def in_blocks(content: bytes, sizes: list[int]):
    def blocks():
        start = 0
        for size in [*sizes, len(content)]:
            yield content[start : start + size]
            start += size

    return blocks


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32),
    st.sampled_from([b"ab", b"abcd", b"abcdefghij klmnop"]),
    st.integers(0, 900),
    st.lists(st.integers(0, 200), max_size=5),
    st.lists(st.integers(0, 300), max_size=4),
    st.integers(64, 400),
)
def test_copies_are_those_that_a_search_finds(seed, letters, size, cuts, lengths, at_once):
    """Random texts of few letters, into which spans of the training text are put, however it comes in blocks."""
    rng = random.Random(seed)

    def noise(count: int) -> bytes:
        return bytes(rng.choices(letters, k=count))

    training = noise(size)
    texts = []
    for length in lengths:
        start = rng.randrange(size + 1)
        texts.append(noise(rng.randrange(80)) + training[start : start + length] + noise(rng.randrange(80)))
    before, copies_module.AT_ONCE = copies_module.AT_ONCE, at_once
    try:
        found = Copies(texts, in_blocks(training, cuts))
    finally:
        copies_module.AT_ONCE = before
    assert list(zip(found.longest, found.shares, strict=True)) == [
        (longest, pytest.approx(share)) for longest, share in (searched(text, training) for text in texts)
    ]


def test_a_text_copied_whole_and_one_of_its_own():
    training = prose(3000).encode()
    whole, own = training[5000:5700], b"Nothing of this was ever said, in 1789 or else; zyx wvu tsr qpo nml kji hgf."
    found = Copies([whole, own, b"short"], in_blocks(training, [7000]))
    assert found.longest[0] == len(whole)
    assert found.shares == [1.0, 0.0, None]
    assert found.longest[1:] == [0, 0]


def test_two_of_which_one_is_copied_further_than_the_other():
    """The longer one must not hide where the shorter one stands."""
    training = b"The cat sees the dog near the old red house, and sleeps."
    texts = [training[:40], b"x" + training[:20] + b"y", training[:21]]
    assert Copies(texts, in_blocks(training, [])).longest == [40, 20, 21]


def test_the_longest_repeat_may_overlap():
    assert longest_repeat("") == longest_repeat("abc") == 0
    assert longest_repeat("a cat, a dog, a cat.") == len("a cat")
    assert longest_repeat("x" * 10) == 9


@given(st.text("ab", max_size=40))
def test_the_longest_repeat_is_that_of_a_search(text):
    spans = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    assert longest_repeat(text) == max((len(span) for span in spans if spans.count(span) > 1), default=0)


def test_distinct_counts_the_same_number_of_words():
    assert distinct([["a", "b"], ["a", "b"]], 1, 100) == 0.5
    assert distinct([["a", "b"], ["a", "b"]], 2, 100) == 0.5  # none across texts
    assert distinct([["a", "b"], ["a", "b"]], 1, 2) == 1
    assert distinct([["a"]], 2, 100) is None


def test_known_words_are_looked_for_in_blocks_that_cut_them():
    content = "the naïve cat\nsleeps".encode()
    wanted = {"the", "naïve", "cat", "sleeps", "slee", "dog", "na"}
    for cut in range(len(content)):
        assert words_seen(wanted, in_blocks(content, [cut])) == {"the", "naïve", "cat", "sleeps"}


def test_the_figures_of_groups_are_by_one_measure():
    training = prose(2000).encode()
    copied = [training[100:400].decode(), training[900:1500].decode()]
    own = ["Zyxx \ufffd wvuu " * 40]
    found = quality({"copied": copied, "own": own}, in_blocks(training, [1000]))
    assert found["copied"]["known_words"] > 0.95
    assert found["copied"]["copied_50_bytes"] == 1
    assert (found["copied"]["longest_copy_mean"], found["copied"]["longest_copy_max"]) == (450, 600)
    assert found["own"]["known_words"] == found["own"]["copied_50_bytes"] == found["own"]["longest_copy_max"] == 0
    assert found["own"]["replacement_characters"] == pytest.approx(1 / 12)
    assert found["own"]["longest_repeat_max"] == 12 * 39
    assert found["own"]["distinct_1"] < 0.1 < found["copied"]["distinct_1"]
    for name in ("known_words", "copied_50_bytes", "longest_copy_max"):
        assert quality({"own": own}, None)["own"][name] is None


# From ids


def ids_of(*texts: str) -> np.ndarray:
    parts = [[*ByteTokenizer().encode(text).tolist(), EOS_ID] for text in texts]
    return np.concatenate([np.array(part) for part in parts])


def test_training_text_keeps_documents_apart(tmp_path):
    (tmp_path / "train.bin").write_bytes(ids_of("one é", "two").astype("<u2").tobytes())
    files = [TokenFile(tmp_path / "train.bin", "<u2", 11)]
    text = training_text(files, ByteTokenizer())
    assert b"".join(text()) == "one é\0two\0\0".encode() == b"".join(text())


def test_documents_start_after_an_end_and_where_something_follows():
    assert document_starts(ids_of("ab", "c")).tolist() == [0, 3]
    assert document_starts(np.array([EOS_ID, 20, EOS_ID])).tolist() == [1]
    assert document_starts(np.array([EOS_ID])).tolist() == []


def test_excerpts_are_documents_or_from_anywhere():
    documents = ids_of(*(f"document {number}" for number in range(10)))
    assert excerpts([documents], ByteTokenizer(), 5, 100) == [f"document {number}" for number in (0, 2, 4, 6, 8)]
    assert excerpts([documents, documents], ByteTokenizer(), 2, 8) == ["document", "document"]
    one = ids_of("á" * 300)
    found = excerpts([one], ByteTokenizer(), 7, 11)
    assert len(found) == 7
    assert set("".join(found)) == {"á"}  # no halves at either end

"""The vocabulary of words: what it knows comes back, and only what it does not is lost."""

import re

import pytest
from hypothesis import given, settings
from kinds import any_text, of_kind

from gptlab.tokenizer import UNK_ID
from gptlab.words import WordTokenizer


@settings(deadline=None, max_examples=100)
@given(text=any_text)
def test_only_words_and_marks_that_are_unknown_are_lost(text):
    tokenizer = of_kind("word")

    def kept(piece: re.Match) -> str:
        return piece[0] if piece[0] in tokenizer.words else "\ufffd"

    assert tokenizer.decode(tokenizer.encode(text)) == re.sub(r"\w+|\s|[^\w\s]", kept, text)


def test_a_word_tokenizer_takes_the_most_frequent():
    tokenizer = WordTokenizer.train(["so so so, so it it is is ab-initio "], vocab_size=20, max_train_bytes=1000)
    assert tokenizer.words == [" ", "\t", "\n", "so", "is", "it", ","]
    assert tokenizer.encode("so  it was").tolist() == [16, 13, 13, 18, 13, UNK_ID]
    assert tokenizer.decode(tokenizer.encode("so  it was")) == "so  it \ufffd"
    assert tokenizer.encode("So").tolist() == [UNK_ID]
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=16: the smallest for any text is 17"):
        WordTokenizer.train(["a"], vocab_size=16, max_train_bytes=1000)


def test_a_word_tokenizer_learns_from_no_more_than_its_budget():
    texts = [f"word{i} " * 400 for i in range(100)]
    small = WordTokenizer.train(iter(texts), vocab_size=1000, max_train_bytes=20_000)
    assert 13 + 3 < small.vocab_size < 13 + 3 + 15
    assert WordTokenizer.train(iter(texts), vocab_size=1000, max_train_bytes=10**6).vocab_size == 13 + 3 + 100

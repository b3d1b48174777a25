"""Domain tokens are one token each, wherever they stand; and the list of a vocabulary can be read and told apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kinds import DOCUMENTS, DOMAIN, KINDS, of_kind, train

from gptlab.tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer
from gptlab.vocabulary import readable


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return of_kind(request.param)


def test_the_vocabulary_is_written_to_be_read(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    with (tmp_path / "vocab.tsv").open(encoding="utf-8", newline="\n") as file:
        header, *rows = [line.rstrip("\n").split("\t") for line in file]
    assert header == ["id", "piece", "bytes", "kind", "score"]
    assert [int(row[0]) for row in rows] == list(range(tokenizer.vocab_size))
    assert [row[1] for row in rows[:13]] == list(SPECIAL_TOKENS)
    assert {row[3] for row in rows[:13]} == {"special"}
    for i, (_, piece, content, kind, score) in enumerate(rows):
        assert bytes.fromhex(content) == tokenizer.decode_bytes([i])
        assert piece.isprintable()
        assert (kind == "special") == (i < 13 or not content)
        assert bool(score) == isinstance(tokenizer, SentencePieceTokenizer)
    spelt = [row[1] for row in rows if row[3] == "byte"]
    assert len(spelt) == len(set(spelt))
    assert bool(spelt) == (tokenizer.loses == "")


@given(st.lists(st.binary(max_size=6) | st.text().map(str.encode), min_size=2, max_size=2, unique=True))
def test_no_two_pieces_are_written_alike(pieces):
    one, other = map(readable, pieces)
    assert one != other
    assert (one + other).isprintable()
    assert " " not in one + other


def test_pieces_as_they_are_written():
    assert readable(" caf\u00e9\n\\n\u200b".encode() + b"\xff") == "\u2423caf\u00e9\\n\\\\n\\u200b\\xff"


# --- domain tokens


@pytest.mark.parametrize("kind", ["bpe", "unigram", "hf", "word"])
@pytest.mark.parametrize("token", DOMAIN)
def test_a_domain_token_is_one_token_wherever_it_stands(kind, token):
    tokenizer = train(kind, domain_tokens=DOMAIN)
    ids = {i for i in range(tokenizer.vocab_size) if tokenizer.kind(i) == "domain"}
    assert {tokenizer.decode([i]) for i in ids} == set(DOMAIN) == set(tokenizer.domain_tokens)
    for text in (token, f"if{token}if", f"if {token} if", f"{token}{token}"):
        found = tokenizer.encode(text).tolist()
        assert len(ids & set(found)) == 1
        assert sum(i in ids for i in found) == text.count(token)
        assert tokenizer.decode(found) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "hf"])
def test_a_domain_token_that_training_is_full_of_is_not_learnt_a_second_time(kind):
    tokenizer = train(kind, [*DOCUMENTS, "ACME ACMEs " * 2000], domain_tokens=["ACME"])
    assert tokenizer.vocab_size == 500
    pieces = [tokenizer.decode([i]) for i in range(500)]
    assert [piece for piece in pieces if "ACME" in piece] == ["ACME"]


@pytest.mark.parametrize("kind", ["bpe", "hf", "word"])
@pytest.mark.parametrize(
    ("tokens", "says"),
    [([""], "blank"), ([" "], "blank"), (["a", "a"], "twice"), (["</s>"], "special"), (["\ud800"], "surrogate")],
)
def test_impossible_domain_tokens_are_refused(kind, tokens, says):
    with pytest.raises(ValueError, match=rf"tokenizer\.domain_tokens=.*{says}"):
        train(kind, domain_tokens=tokens)


@pytest.mark.parametrize("token", ["a\u2581b", "<0x41>"])
def test_signs_of_sentencepiece_are_no_domain_tokens_of_it(token):
    with pytest.raises(ValueError, match="use tokenizer=hf"):
        train("bpe", domain_tokens=[token])
    hf = train("hf", domain_tokens=[token])
    assert len(hf.encode(token)) == 1

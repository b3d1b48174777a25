"""tokenizer.json: the ids of the library are ours, for any text and every kind of tokenizer."""

import base64
import json
import re

import pytest
import regex
import sentencepiece
import tokenizers as tokenizers_library
from hypothesis import given, settings
from kinds import DOCUMENTS, DOMAIN, KINDS, any_text, foreign_json, of_kind, ranks_of, train

from gptlab.borrowed import PATTERNS, HuggingFaceTokenizer, TiktokenTokenizer
from gptlab.export.folder import TEXTS, samples
from gptlab.export.vocabulary import tokenizer_json
from gptlab.pieces import KINDS as PIECE_KINDS
from gptlab.pieces import contents
from gptlab.tokenizer import EOS_ID, SPECIAL_TOKENS, ByteTokenizer, SentencePieceTokenizer
from gptlab.words import WordTokenizer


def collides() -> bytes:
    """A foreign tokenizer.json some of whose tokens are called as ours are: Qwen3's, say, has <tool_call>."""
    content = json.loads(foreign_json())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = vocabulary | {"</s>": len(vocabulary)}
    own = content["added_tokens"][0]
    content["added_tokens"] = [
        own | {"id": 601, "content": "<|endoftext|>"},
        own | {"id": 602, "content": "<tool_call>", "special": False},
    ]
    return json.dumps(content).encode()


MORE = {
    "unigram of few characters": lambda: train("unigram", ["a rose is a rose, is it s < 4? " * 40], vocab_size=284),
    "bpe of few characters": lambda: train("bpe", ["a rose is a rose " * 40], vocab_size=290),
    "unigram domain": lambda: train("unigram", domain_tokens=DOMAIN),
    "word domain": lambda: train("word", domain_tokens=DOMAIN),
    "cl100k": lambda: TiktokenTokenizer(ranks_of(of_kind("hf")), "cl100k_base"),
    "collides": lambda: HuggingFaceTokenizer(collides()),
    "bare sentencepiece": lambda: SentencePieceTokenizer(of_kind("domain").model),
}
ALL = [*KINDS, *MORE]
built = {}


def pair(kind: str):
    """One of our tokenizers, and the library's from its tokenizer.json."""
    if kind not in built:
        ours = MORE[kind]() if kind in MORE else of_kind(kind)
        theirs = tokenizers_library.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
        theirs.encode_special_tokens = True
        built[kind] = ours, theirs
    return built[kind]


def check(kind: str, text: str) -> None:
    ours, theirs = pair(kind)
    ids, found = ours.encode(text).tolist(), theirs.encode(text, add_special_tokens=False).ids
    if "unigram" in kind and sorted(found) == sorted(ids):
        return  # in another order they are as likely, and rounding chooses
    assert found == ids
    assert theirs.encode(text).ids == [EOS_ID, *ids]


@pytest.mark.parametrize("kind", ALL)
def test_ids_are_ours_for_text_of_all_sorts(kind):
    for text in (*TEXTS, *samples(pair(kind)[0]), *(DOCUMENTS[0][i : i + 400] for i in range(0, 20_000, 401))):
        check(kind, text)


@pytest.mark.parametrize("kind", ALL)
def test_ids_are_ours_for_any_text(kind):
    @settings(deadline=None, max_examples=60)
    @given(text=any_text.filter(lambda text: not re.search("[\ud800-\udfff]", text)))
    def any_ids(text):
        check(kind, text)

    any_ids()


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("char", "word", "word domain")])
def test_text_comes_back(kind):
    ours, theirs = pair(kind)
    for text in TEXTS:
        assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=True) == text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ALL)
def test_every_id_has_a_name_and_special_ones_are_so(kind):
    ours, theirs = pair(kind)
    assert theirs.get_vocab_size(with_added_tokens=True) == ours.vocab_size
    special = ours.special_tokens
    names = [theirs.id_to_token(i) for i in range(len(special))]
    if kind != "collides":
        assert names == list(special)
    assert len(set(names)) == len(names)
    added = theirs.get_added_tokens_decoder()
    assert all(added[i].special for i in range(len(special)))
    theirs.encode_special_tokens = False  # as other programs do: a name in the text is the token
    try:
        for i, name in enumerate(names):
            assert theirs.encode(f"a{name}b", add_special_tokens=False).ids.count(i) == 1, name
    finally:
        theirs.encode_special_tokens = True


def test_names_that_a_foreign_vocabulary_has_too_are_left_to_it():
    ours, theirs = pair("collides")
    assert theirs.token_to_id("<tool_call>") == 602 + 13
    assert theirs.id_to_token(2) == "<|gptlab:/s|>"
    assert theirs.id_to_token(9) == "<|gptlab:tool_call|>"
    assert ours.encode("<tool_call>").tolist() == [615]


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_cut_at_every_place_as_those_of_tiktoken(name):
    content = tokenizer_json(TiktokenTokenizer(ranks_of(of_kind("hf")), name))
    cut = tokenizers_library.Tokenizer.from_str(json.dumps(content)).pre_tokenizer
    for text in (*TEXTS, DOCUMENTS[0]):
        parts = [text[start:end] for _, (start, end) in cut.pre_tokenize_str(text)]
        assert parts == regex.findall(PATTERNS[name].replace("$", r"\Z"), text)


def test_a_piece_that_no_two_others_make_is_found_whole():
    singles = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    tokenizer = TiktokenTokenizer(singles + base64.b64encode(b"abcd") + b" 256\n", "gpt2")
    theirs = tokenizers_library.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    for text in ("abcd", "abcde", "abcd abcd", "abcd."):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
    assert tokenizer.encode("abcd").tolist() == [256 + 13]


def test_words_and_spaces_are_pythons_own():
    """Of every character there is, those too that came with a newer Unicode than one of the two knows."""
    ours, theirs = pair("word")
    every = [*range(0xD800), *range(0xE000, 0x110000)]
    for start in range(0, len(every), 10_000):
        text = "".join(f"a{chr(code)}" for code in every[start : start + 10_000])
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist(), hex(start)


def test_runs_of_spaces_are_known_whole_or_spelt_one_by_one():
    tokenizer = WordTokenizer(["a", " ", "\n", "\t", "  ", "\n\n"])
    theirs = tokenizers_library.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    for text in ("a  a", "a   a", "a    a", "a\n\na", "a\n\n\na", "a \n a", "\x1c\x85\u3000", "  ", "   "):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist(), text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "domain"])
def test_pieces_are_what_sentencepiece_says(kind):
    model = of_kind(kind).model
    model_type, pieces = contents(model)
    assert model_type == ("unigram" if kind == "unigram" else "bpe")
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(pieces) == sp.vocab_size()
    for i, piece in enumerate(pieces):
        assert piece.text == sp.id_to_piece(i)
        assert piece.score == sp.get_score(i)
        tests = {"control": sp.is_control(i), "unknown": sp.is_unknown(i), "byte": sp.is_byte(i)}
        tests["unused"] = sp.is_unused(i)
        assert {name for name, holds in tests.items() if holds} == {piece.kind} - {"normal", "domain"}
    spelt = [piece.text.replace("\u2581", " ") for piece in pieces if piece.kind == "domain"]
    assert spelt == (DOMAIN if kind == "domain" else [])
    assert PIECE_KINDS[1] == "normal"


def test_a_tokenizer_of_ones_own_is_refused_by_its_name():
    class Mine(ByteTokenizer):
        pass

    with pytest.raises(
        ValueError, match=r"test_export_vocabulary\..*Mine does; there is one for SentencePieceTokenizer"
    ):
        tokenizer_json(Mine())


def test_special_tokens_are_the_first_ids():
    content = tokenizer_json(of_kind("bpe"))
    assert [token["content"] for token in content["added_tokens"]] == list(SPECIAL_TOKENS)

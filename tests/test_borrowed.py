"""Tokenizers of other libraries: held to those libraries, and what would lose text is refused or says so."""

import base64
import json
import sys

import numpy as np
import pytest
import tiktoken
import tokenizers as tokenizers_library
from hypothesis import given, settings
from kinds import DOCUMENTS, any_text, foreign_json, of_kind, ranks_of, train
from tiktoken_ext import openai_public

from gptlab.borrowed import BYTE_OF, PATTERNS, HuggingFaceTokenizer, TiktokenTokenizer
from gptlab.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: of_kind(kind) for kind in ("hf", "foreign", "tiktoken")}


@settings(deadline=None, max_examples=100)
@given(text=any_text)
def test_foreign_ids_are_the_librarys_own_moved_behind_the_special_tokens(tokenizers, text):
    own = tokenizers_library.Tokenizer.from_str(foreign_json())
    own.encode_special_tokens = True
    theirs = own.encode(text, add_special_tokens=False).ids
    assert tokenizers["foreign"].encode(text).tolist() == [i + 13 for i in theirs]
    assert own.get_vocab_size() + 13 == tokenizers["foreign"].vocab_size


@settings(deadline=None, max_examples=100)
@given(text=any_text)
def test_tiktoken_ids_are_the_librarys_own_and_its_pieces_those_of_the_other_library(tokenizers, text):
    ranks = {
        base64.b64decode(line.split()[0]): int(line.split()[1]) for line in ranks_of(tokenizers["hf"]).split(b"\n")[:-1]
    }
    own = tiktoken.Encoding("x", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    ids = tokenizers["tiktoken"].encode(text)
    assert ids.tolist() == [i + 13 for i in own.encode_ordinary(text)]
    assert ids.tolist() == tokenizers["hf"].encode(text).tolist()


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "p50k_base", "cl100k_base"])
def test_patterns_are_those_of_the_library(name, monkeypatch):
    for reader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, reader, lambda *_, **__: {})
    assert openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"] == PATTERNS[name]


@pytest.mark.parametrize("kind", ["foreign", "tiktoken", "hf"])
def test_ids_of_long_text_are_those_of_the_text_in_one_piece(tokenizers, kind):
    text = "".join(DOCUMENTS) * 2
    assert len(text) > 4 * 2**16
    tokenizer = tokenizers[kind]
    assert tokenizer.encode(text).tolist() == list(tokenizer._encode(text))


def test_a_foreign_special_token_has_an_id_and_never_comes_of_text(tokenizers):
    foreign = tokenizers["foreign"]
    last = foreign.vocab_size - 1
    assert (foreign.kind(last), foreign.decode_bytes([last])) == ("special", b"")
    assert last not in foreign.encode("a<|endoftext|>b")
    assert foreign.decode(foreign.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def changed_json(**changes) -> bytes:
    return json.dumps(json.loads(foreign_json()) | changes).encode()


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"normalizer": {"type": "NFC"}}, "comes back as"),
        ({"normalizer": {"type": "Lowercase"}}, "comes back as"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "' a b'"),
    ],
)
def test_a_foreign_tokenizer_says_what_it_loses(changes, lost):
    tokenizer = HuggingFaceTokenizer(changed_json(**changes))
    assert lost in tokenizer.loses
    assert np.array_equal(tokenizer.encode("a " * 2**17), tokenizer._encode("a " * 2**17))


def test_a_foreign_tokenizer_draws_no_lots_and_swallows_no_space():
    content = json.loads(foreign_json())
    token = content["added_tokens"][0] | {
        "id": 601,
        "content": "ACME",
        "special": False,
        "lstrip": True,
        "rstrip": True,
    }
    changes = {"model": content["model"] | {"dropout": 0.5}, "added_tokens": [*content["added_tokens"], token]}
    tokenizer = HuggingFaceTokenizer(changed_json(**changes))
    assert tokenizer.encode(DOCUMENTS[0]).tolist() == of_kind("foreign").encode(DOCUMENTS[0]).tolist()
    assert tokenizer.decode(tokenizer.encode("an  ACME  part")) == "an  ACME  part"
    assert tokenizer.domain_tokens == ("ACME",)


def test_what_a_foreign_tokenizer_adds_and_cuts_is_left_out(tokenizers):
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    roberta = {
        "type": "RobertaProcessing",
        "sep": ["a", 1],
        "cls": ["b", 2],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    tokenizer = HuggingFaceTokenizer(changed_json(truncation=cut, post_processor=roberta))
    assert tokenizer.encode(DOCUMENTS[0]).tolist() == tokenizers["foreign"].encode(DOCUMENTS[0]).tolist()
    assert tokenizer.fingerprint == tokenizers["foreign"].fingerprint


def masquerade() -> bytes:
    """A tokenizer.json that begins with gptlab's special tokens, one of which its merges make of plain text."""
    content = json.loads(train("hf").json)
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = vocabulary | {"<s": len(vocabulary)}
    content["model"]["merges"] = [["<", "s"], ["<s", ">"]]
    content["pre_tokenizer"]["use_regex"] = False
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed_json(pre_tokenizer={"type": "Whitespace"}), "not made of bytes.*byte-level tokenizer.json"),
        (changed_json(added_tokens=None), "damaged"),
        (b'{"model": {}}', "damaged"),
        (masquerade(), "text can spell its special token '<s>'"),
        (
            changed_json(model=json.loads(foreign_json())["model"] | {"vocab": {"a": 0}, "merges": []}),
            "of the 256 bytes",
        ),
    ],
)
def test_a_tokenizer_json_that_would_lose_text_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("wrong", [None, [], {}, "x", 3])
def test_a_damaged_tokenizer_json_is_refused_and_nothing_worse(tmp_path, wrong):
    content = json.loads(foreign_json())
    file = tmp_path / "tokenizer.json"
    for key in content:
        for damaged in ({k: v for k, v in content.items() if k != key}, content | {key: wrong}, wrong):
            file.write_text(json.dumps(damaged))
            assert outcome(file) in ("a b", "refused"), key


def outcome(file) -> str:
    try:
        tokenizer = load_tokenizer(file)
    except ValueError:
        return "refused"
    return tokenizer.decode(tokenizer.encode("a b"))


def test_files_of_other_libraries_are_read_where_they_lie(tokenizers, tmp_path, monkeypatch):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "tokenizer.json").write_text(foreign_json())
    assert load_tokenizer(tmp_path / "exported").fingerprint == tokenizers["foreign"].fingerprint
    tokenizers["hf"].save(tmp_path / "own")  # the file that is left there is one that the library reads
    assert load_tokenizer(tmp_path / "own" / "tokenizer.json").fingerprint == tokenizers["hf"].fingerprint
    file = tmp_path / "gpt2.tiktoken"
    file.write_bytes(ranks_of(tokenizers["hf"]))
    assert load_tokenizer(file).fingerprint == tokenizers["tiktoken"].fingerprint
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(tmp_path))
    assert TiktokenTokenizer.train(name="gpt2").fingerprint == tokenizers["tiktoken"].fingerprint
    with pytest.raises(ValueError, match=r"call it one of gpt2\.tiktoken"):
        load_tokenizer(file.rename(tmp_path / "mine.tiktoken"))


def test_vocab_bpe_gives_the_ids_that_tiktoken_gives_it(tmp_path, monkeypatch):
    merges = [tuple(merge) for merge in json.loads(foreign_json())["model"]["merges"]]
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    names = [*BYTE_OF, *(a + b for a, b in merges)]
    (tmp_path / "encoder.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(tmp_path / "vocab.bpe"), str(tmp_path / "encoder.json"))
    tokenizer = load_tokenizer(tmp_path / "vocab.bpe")
    assert {tokenizer.decode_bytes([i]): i - 13 for i in range(13, tokenizer.vocab_size)} == ranks


@pytest.mark.parametrize(
    "content",
    [b"a b c\n", b"!!! 1\n", b"YQ== one\n", b"YQ== 0\n", b"YQ== -5\n", b"YQ== 99999999999\n", b"YQ== 0\nYg== 0\n"],
)
def test_a_file_of_ranks_that_is_damaged_is_refused_by_name(tmp_path, content):
    file = tmp_path / "gpt2.tiktoken"
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"gpt2\.tiktoken: (not a file of ranks|255 of the 256 bytes|its id -?\d+ does)"
    ):
        load_tokenizer(file)


def test_tiktoken_names_the_places_where_it_looked_and_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it went to the network"))
    with pytest.raises(ValueError, match=r"tokenizer\.name=gpt2: .*none is downloaded.*gptlab\[data\]") as error:
        TiktokenTokenizer.train(name="gpt2")
    for place in ("data/gpt2.tiktoken", "data/vocab.bpe", "kept/6d1cbeee0f20b3d9449abfede4726ed8212e3aee"):
        assert str(tmp_path / place) in str(error.value)
    with pytest.raises(ValueError, match=r"tokenizer\.name='gpt5' is none of gpt2"):
        TiktokenTokenizer.train(name="gpt5")


@pytest.mark.parametrize(("kind", "library"), [("hf", "tokenizers"), ("tiktoken", "tiktoken")])
def test_a_library_that_is_not_installed_is_named_with_its_extra(tokenizers, tmp_path, monkeypatch, kind, library):
    tokenizers[kind].save(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf'needs {library} .*pip install "gptlab\[data\]"'):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=rf'needs {library} .*pip install "gptlab\[data\]"'):
        train("hf") if kind == "hf" else TiktokenTokenizer(tokenizers[kind].ranks, "gpt2")

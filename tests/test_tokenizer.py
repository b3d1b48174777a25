"""Tokenizers: what goes in comes out, ids keep their meaning, and every mistake is named."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import DOCUMENTS, KINDS, LOSSLESS, LOSSY, SPANISH, TRAINED, any_text, of_kind, train

from gptlab.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_state,
)
from gptlab.words import WordTokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {kind: of_kind(kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers) -> Tokenizer:
    return tokenizers[request.param]


any_bytes = st.lists(st.binary(max_size=20) | any_text.map(lambda t: t.encode()), max_size=6).map(b"".join)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(deadline=None, max_examples=150)
@given(text=any_text, content=any_bytes)
def test_text_and_bytes_come_back_exactly(tokenizers, kind, text, content):
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(content)) == content
    assert np.array_equal(tokenizer.encode(text), tokenizer.encode(text.encode()))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(text=any_text)
def test_text_never_gives_a_special_id(tokenizers, kind, text):
    ids = tokenizers[kind].encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    allowed = {UNK_ID} if kind in LOSSY else set()
    assert set(ids.tolist()) & set(range(len(SPECIAL_TOKENS))) <= allowed


@pytest.mark.parametrize("kind", ["bpe", "hf"])
@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_typed_by_a_user_is_plain_text_even_where_training_was_full_of_it(kind, token):
    tokenizer = train(kind, [f"{token}hello {token} " * 500, *DOCUMENTS])
    ids = tokenizer.encode(f"say {token}{token}")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == f"say {token}{token}"


def test_special_tokens_have_the_same_ids_in_every_kind(tokenizer):
    assert (UNK_ID, BOS_ID, EOS_ID, PAD_ID) == (0, 1, 2, 3)
    assert [tokenizer.special_id(token) for token in SPECIAL_TOKENS] == list(range(13))
    assert tokenizer.decode_bytes(range(1, 13)) == b""
    with pytest.raises(ValueError, match=r"'<think>'.*<\|user\|>"):
        tokenizer.special_id("<think>")


def test_sentencepiece_itself_agrees_on_the_special_tokens(tokenizers):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizers["bpe"].model)
    assert [processor.id_to_piece(i) for i in range(13)] == list(SPECIAL_TOKENS)
    assert all(processor.is_control(i) for i in range(1, 13))


@pytest.mark.parametrize("unit", ["line of words\n", "word ", "solid", "ñ\U0001f600", "\n", " ", "\u2581x\n"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_long_text_comes_back_wherever_it_is_cut(tokenizers, kind, unit):
    text = unit * (140_000 // len(unit))
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("unit", ["parser.arguments\n", " argument"])
def test_cuts_at_line_ends_or_else_before_spaces_leave_the_ids_alone(tokenizers, unit):
    tokenizer = tokenizers["bpe"]
    assert np.array_equal(tokenizer.encode(unit * 2000), np.tile(tokenizer.encode(unit), 2000))


def test_documents_encoded_one_by_one_decode_to_their_concatenation(tokenizer):
    ids = np.concatenate([tokenizer.encode(text) for text in DOCUMENTS])
    assert tokenizer.decode(ids) == "".join(DOCUMENTS)


def test_odd_input(tokenizers, tokenizer):
    assert tokenizer.encode("").dtype == tokenizer.encode(b"").dtype == np.int32
    assert tokenizer.decode_bytes([]) == b""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # JSON can bring a lone surrogate
    assert tokenizer.decode(torch.tensor(tokenizer.encode("abc"))) == "abc"
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([wrong])


def test_a_char_tokenizer_shows_what_it_does_not_know():
    tokenizer = CharTokenizer.train(["banana"])
    assert tokenizer.vocab_size == 13 + 3
    assert tokenizer.encode("nab").tolist() == [15, 13, 14]
    assert tokenizer.encode("nxb").tolist() == [15, UNK_ID, 14]
    assert tokenizer.decode(tokenizer.encode("n\U0001f600b")) == "n\ufffdb"
    assert tokenizer.encode(b"n\xff").tolist() == [15, UNK_ID]


def test_a_byte_tokenizer_needs_no_text():
    tokenizer = ByteTokenizer.train([])
    assert tokenizer.vocab_size == 269
    assert tokenizer.encode("é").tolist() == [13 + 0xC3, 13 + 0xA9]


# --- what an id means, kept


def assert_same(one: Tokenizer, other: Tokenizer):
    assert type(one) is type(other)
    assert (one.fingerprint, one.settings, one.vocab_size) == (other.fingerprint, other.settings, other.vocab_size)
    assert np.array_equal(one.encode(DOCUMENTS[0]), other.encode(DOCUMENTS[0]))


def test_save_and_load(tokenizer, tmp_path):
    run_folder = tmp_path / "run"
    tokenizer.save(run_folder / "tokenizer")
    before = {file.name: file.read_bytes() for file in (run_folder / "tokenizer").iterdir()}
    tokenizer.save(run_folder / "tokenizer")
    assert before == {file.name: file.read_bytes() for file in (run_folder / "tokenizer").iterdir()}
    sidecar = run_folder / "tokenizer" / "gptlab_tokenizer.json"
    for path in (run_folder, run_folder / "tokenizer", sidecar, str(sidecar)):
        assert_same(load_tokenizer(path), tokenizer)


def test_another_tokenizer_that_stood_there_is_kept(tokenizers, tmp_path):
    folder = tmp_path / "tokenizer"
    for kind in KINDS * 2:
        tokenizers[kind].save(folder)
        assert_same(load_tokenizer(folder), tokenizers[kind])
    kept = {path.name: load_tokenizer(path).fingerprint for path in tmp_path.iterdir() if path != folder}
    assert kept == {f"tokenizer.old-{t.fingerprint[:8]}": t.fingerprint for t in tokenizers.values()}


def test_a_crash_while_the_old_one_is_moved_loses_neither(tokenizers, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    tokenizers["bpe"].save(folder)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copy2", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            tokenizers["hf"].save(folder)
    assert_same(load_tokenizer(folder), tokenizers["bpe"])
    with monkeypatch.context() as patch:
        patch.setattr("gptlab.tokenizer._write", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            tokenizers["hf"].save(folder)
    assert_same(load_tokenizer(next(tmp_path.glob("tokenizer.old-*"))), tokenizers["bpe"])


def test_state_travels_in_a_checkpoint_without_pickled_objects(tokenizer):
    file = io.BytesIO()
    torch.save({"tokenizer": tokenizer.state()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["tokenizer"]
    assert_same(tokenizer_from_state(state), tokenizer)
    assert_same(type(tokenizer).from_state(state), tokenizer)


@pytest.mark.parametrize("kind", TRAINED)
def test_training_again_gives_the_same_fingerprint(tokenizers, kind):
    assert train(kind).fingerprint == tokenizers[kind].fingerprint


def test_fingerprints_stay_what_they_are_in_checkpoints_that_exist():
    """A change here makes every tokenizer that was ever saved a damaged one."""
    assert ByteTokenizer().fingerprint.startswith("aa386da32e1bd166")
    assert CharTokenizer("abc").fingerprint.startswith("2f1554278fd8a45f")
    assert WordTokenizer(["a", "b"], ["x"]).fingerprint.startswith("95defef6d85f14a6")


def test_fingerprint_tells_what_an_id_means_and_nothing_else(tokenizers):
    bpe = tokenizers["bpe"]
    different = [train("bpe", vocab_size=501), train("bpe", DOCUMENTS[:1]), CharTokenizer.train(["abc"])]
    assert len({t.fingerprint for t in [*tokenizers.values(), *different]}) == len(KINDS) + 3
    trainer = sentencepiece.SentencePieceTrainer
    original = trainer.train

    def with_one_thread(**options):
        original(**(options | {"num_threads": 1}))

    with pytest.MonkeyPatch.context() as patch:  # the same in all but the record of how it was made
        patch.setattr(trainer, "train", staticmethod(with_one_thread))
        retrained = train("bpe")
    assert retrained.model != bpe.model
    assert retrained.fingerprint == bpe.fingerprint


# --- characters


def test_coverage_counts_characters_that_are_tokens(tokenizers):
    counts = Counter(" ab\n") + Counter({"\u2581": 1, "é": 3})
    assert tokenizers["bpe"].coverage(counts) == tokenizers["char"].coverage(counts) == 4 / 8
    assert tokenizers["byte"].coverage(counts) == 1
    assert tokenizers["bpe"].coverage({}) == 0


def test_character_coverage_leaves_the_rarest_characters_to_bytes():
    text = SPANISH * 100 + "\u0416"
    counts = Counter(text)
    some, full = (train("bpe", [text], vocab_size=320, character_coverage=share) for share in (0.9995, 1.0))
    assert full.coverage(counts) == 1
    assert 0.9995 <= some.coverage(counts) < 1
    assert some.decode(some.encode(text)) == text


def test_newline_and_tab_are_tokens_even_when_training_has_none():
    tokenizer = train("bpe", [SPANISH * 10], vocab_size=310)
    assert tokenizer.coverage(Counter("\n\t")) == 1


def test_text_with_the_signs_of_sentencepiece_is_learnt_from_all_the_same():
    tokenizer = train("bpe", ["\u2585\u2581 \ud800 banana bandana\n" * 50], vocab_size=285)
    assert len(tokenizer.encode(" banana")) == 1


def test_runs_of_line_ends_and_indentation_are_cheap(tokenizers):
    assert len(tokenizers["bpe"].encode("\n        return self\n")) <= 6


# --- mistakes


@pytest.mark.parametrize("kind", ["bpe", "unigram", "hf", "hf-domain"])
@pytest.mark.parametrize(("vocab_size", "word"), [(100_000, "largest"), (20, "smallest"), (268, "smallest")])
def test_an_impossible_vocabulary_is_answered_with_the_nearest_possible_one(kind, vocab_size, word):
    with pytest.raises(ValueError, match=rf"tokenizer\.vocab_size={vocab_size}: the {word} (possible )?for") as error:
        train(kind, DOCUMENTS[:1], vocab_size=vocab_size)
    possible = int(str(error.value).split("text is ")[1].split(";")[0])
    assert train(kind, DOCUMENTS[:1], vocab_size=possible).vocab_size == possible


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "hf"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_an_empty_corpus_is_refused(kind, texts):
    with pytest.raises(ValueError, match="training text is empty"):
        train(kind, texts)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"tokenizer\.model_type='wordpiece'"):
        train("wordpiece")
    with pytest.raises(ValueError, match=r"tokenizer\.character_coverage=0\.5"):
        train("bpe", character_coverage=0.5)


def rewrite(sidecar, **changes):
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": "elsewhere.tokens.Mine"}, "trust=elsewhere"),
        ({"class": "gptlab.tokenizer.Path"}, "not a subclass"),
        ({"class": "gptlab.tokenizer.NoSuch"}, "no 'NoSuch'"),
        ({"format": 99}, "format 99 is unknown"),
        ({"data": {"characters": "abd"}}, "damaged"),
        ({"data": {}}, "damaged"),
        ({"data": None}, "does not hold a tokenizer"),
        ({"fingerprint": "0" * 64}, "damaged"),
        ({"files": ["/../secret"]}, "names no file of its own"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_by_name(tmp_path, changes, message):
    CharTokenizer.train(["abc"]).save(tmp_path)
    sidecar = tmp_path / "gptlab_tokenizer.json"
    rewrite(sidecar, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(sidecar) in str(error.value)


def test_a_file_that_is_no_json_is_named_with_the_remedy(tmp_path):
    ByteTokenizer().save(tmp_path)
    sidecar = tmp_path / "gptlab_tokenizer.json"
    sidecar.write_text("{broken")
    with pytest.raises(ValueError, match="it is damaged: restore it, or name another") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{sidecar}: ")


def test_damaged_and_missing_files_are_refused_by_name(tokenizers, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*give tokenizer.path"):
        load_tokenizer(tmp_path)
    tokenizers["bpe"].save(tmp_path)
    model = tmp_path / "tokenizer.model"
    train("bpe", vocab_size=501).save(tmp_path / "other")
    for content in (
        (tmp_path / "other" / "tokenizer.model").read_bytes(),
        model.read_bytes()[:-900],
        b"",
        b"\x00" * 99,
    ):
        model.write_bytes(content)
        with pytest.raises(ValueError, match=r"gptlab_tokenizer\.json: .*damaged"):
            load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "gptlab_tokenizer.json").write_text('{"format": 1,')
    with pytest.raises(ValueError, match=r"gptlab_tokenizer\.json"):
        load_tokenizer(tmp_path)


class UpperTokenizer(ByteTokenizer):
    """A user's own kind, in the user's own module."""

    def encode(self, text):
        return super().encode(text.upper())


def test_a_users_own_class_is_loaded_once_trusted(tmp_path):
    UpperTokenizer.train([]).save(tmp_path)
    package = __name__.split(".")[0]
    with pytest.raises(ValueError, match="not a dotted name under gptlab"):
        load_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path, trust=(package,))
    assert loaded.decode(loaded.encode("abc")) == "ABC"


# --- models made elsewhere


def bare_model(tmp_path, **changes):
    lossless = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    }
    options = {"model_type": "bpe", "vocab_size": 450, "pad_id": 3, "minloglevel": 2} | lossless | changes
    text = "".join(DOCUMENTS)
    with (tmp_path / "bare.model").open("wb") as file:
        pieces = iter(text[i : i + 2000] for i in range(0, len(text), 2000))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=pieces, model_writer=file, **options)
    return tmp_path / "bare.model"


def test_a_bare_lossless_model_is_taken_as_it_is(tokenizers, tmp_path):
    tokenizer = load_tokenizer(bare_model(tmp_path))
    assert tokenizer.special_tokens == SPECIAL_TOKENS[:4]
    with pytest.raises(ValueError, match=r"no special token; this tokenizer has <unk>, <s>, </s>, <pad>"):
        tokenizer.special_id("<|user|>")
    tokenizer.save(tmp_path / "saved")
    assert_same(load_tokenizer(tmp_path / "saved"), tokenizer)
    (tmp_path / "own.model").write_bytes(tokenizers["bpe"].model)
    assert load_tokenizer(tmp_path / "own.model").fingerprint == tokenizers["bpe"].fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_id": -1}, "ids 0 to 3"),
        ({"normalization_rule_name": "nfkc"}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"add_dummy_prefix": True}, "changes text"),
        ({"byte_fallback": False}, "changes text"),
    ],
)
def test_a_bare_model_that_would_change_text_is_refused(tmp_path, changes, message):
    path = bare_model(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "noise.model").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "noise.model")

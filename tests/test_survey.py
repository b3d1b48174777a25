"""What is said of documents is what a plain count of them says, whatever parts and blocks they come in."""

import random
import unicodedata
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import prose

from gptlab.data import overlap as overlap_module
from gptlab.data import survey as survey_module
from gptlab.data.cleaning import exact
from gptlab.data.corpus import Files
from gptlab.data.document import Document
from gptlab.data.overlap import GRAM, gram_hashes, overlap
from gptlab.data.shards import Ids
from gptlab.data.survey import documents_of, survey_ids, survey_text
from gptlab.tokenizer import EOS_ID, ByteTokenizer, CharTokenizer

TEXTS = [
    *("one two three\n", "one  two\tthree", "four\n", "  \n", "ñandú \U0001f600", "a\x1bb\nc\x07\x1b", ""),
    *("four\n", "one two three\n", "\ufeffx\ud800", "page\fpage"),
]


def documents(texts) -> list[Document]:
    return [Document(f"d{number}", text) for number, text in enumerate(texts)]


def in_parts(document: Document, cuts: list[int]) -> list[Document]:
    bounds = [0, *cuts, len(document.text)]
    pieces = [document.text[a:b] for a, b in pairwise(bounds)]
    starts = np.cumsum([0, *map(len, pieces)]).tolist()
    total = len(document.text)
    return [Document(document.name, piece, start, total) for piece, start in zip(pieces, starts, strict=False)]


def test_text_is_counted_as_a_plain_count_does():
    survey = survey_text(documents(TEXTS))
    characters = Counter("".join(TEXTS))
    assert survey.documents == len(TEXTS)
    assert survey.length == sum(map(len, TEXTS))
    assert survey.bytes == len("".join(TEXTS).encode("utf-8", "surrogatepass"))
    assert {chr(code): survey.characters[code] for code in np.flatnonzero(survey.characters)} == characters
    assert (survey.empty_documents, survey.empty) == (2, ["d3", "d6"])
    assert survey.longest == "d0"
    lengths = survey.lengths()
    assert (lengths["shortest"], lengths["longest"], lengths["unit"]) == (0, 14, "characters")
    assert lengths["median"] == sorted(map(len, TEXTS))[len(TEXTS) // 2]
    assert lengths["histogram"] == {"0": 1, "1": 7, "10": 3}


def test_copies_are_those_that_deduplicate_exact_leaves_out():
    survey, is_copy = survey_text(documents(TEXTS)), exact()
    copies = survey.copies(lambda: (document.name for document in documents(TEXTS)))
    assert copies["documents"] == sum(is_copy(text) for text in TEXTS)
    assert copies["examples"] == [["d0", "d1"], ["d3", "d6"], ["d2", "d7"]]


def test_suspect_characters_are_named_with_their_place():
    suspects = survey_text(documents(TEXTS)).suspects()
    assert [(one["character"], one["times"], one["first"]) for one in suspects] == [
        ("U+001B", 2, "d5, line 1"),
        ("U+0007", 1, "d5, line 2"),
        ("U+D800", 1, "d9, line 1"),
        ("U+FEFF", 1, "d9, line 1"),
    ]
    assert suspects[0]["name"] == "escape"
    plain = "".join(chr(i) for i in range(32, 0x3000) if unicodedata.category(chr(i)) not in ("Cc", "Cn")) + "\t\n\f"
    assert survey_text([Document("d", plain)]).suspects() == []


@pytest.mark.parametrize("batch", [1, 7, 2**19])
def test_parts_and_batches_make_no_difference(monkeypatch, batch):
    monkeypatch.setattr(survey_module, "BATCH_CHARACTERS", batch)
    rng = random.Random(batch)
    text = [prose(40, seed) + "\x07" * (seed == 3) for seed in range(6)] + [prose(40, 2)]
    whole = survey_text(documents(text))
    cut = []
    for document in documents(text):
        places = [m for m, c in enumerate(document.text, start=1) if c == "\n" and m < len(document.text)]
        cut += in_parts(document, sorted(rng.sample(places, min(3, len(places)))))
    parts = survey_text(cut)
    for figure in ("documents", "length", "bytes", "empty_documents", "longest", "first"):
        assert getattr(whole, figure) == getattr(parts, figure), figure
    assert whole.lengths() == parts.lengths()
    assert whole.copies(lambda: map(str, range(7))) == parts.copies(lambda: map(str, range(7)))
    assert whole.copies(lambda: map(str, range(7)))["examples"] == [["2", "6"]]


def test_a_file_too_large_to_hold_is_one_document(tmp_path, monkeypatch):
    from gptlab.data import formats

    monkeypatch.setattr(formats, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(formats, "PART_BYTES", 300)
    (tmp_path / "a.txt").write_text(prose(400))
    (tmp_path / "b.txt").write_text(prose(400))
    source = Files(f"{tmp_path}/*.txt")
    assert len(list(source.documents())) > 10
    survey = survey_text(source.documents())
    assert survey.documents == 2
    assert survey.copies(lambda: (d.name for d in source.documents() if d.ends))["examples"] == [["a.txt", "b.txt"]]


# Ids


@pytest.fixture
def runs(tmp_path):
    def write(*own: np.ndarray, dtype: str = "<u2") -> list[Ids]:
        found = []
        for number, ids in enumerate(own):
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}-{number}.bin"
            np.asarray(ids).astype(dtype).tofile(path)
            found.append(Ids(path, dtype, len(ids)))
        return found

    return write


@pytest.mark.parametrize("block", [2, 6, 2**23])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_ids_are_counted_as_their_text_is(runs, monkeypatch, block, dtype):
    monkeypatch.setattr("gptlab.data.tokens.BLOCK_BYTES", block * 2)
    monkeypatch.setattr(survey_module, "COUNTED_IDS", 3)
    tokenizer = ByteTokenizer()
    texts = ["ab\x1b", "", "ab\x1b", "cd", "x" * 50, "cd", ""]
    ids = [np.append(tokenizer.encode(text), EOS_ID) for text in texts]
    survey = survey_ids(runs(np.concatenate(ids[:4]), np.concatenate(ids[4:]), dtype=dtype), tokenizer)
    assert survey.documents == len(texts)
    assert (survey.empty_documents, survey.length) == (2, sum(map(len, texts)))
    copies = survey.copies(lambda: map(str, range(7)))
    assert (copies["documents"], copies["examples"]) == (3, [["0", "2"], ["3", "5"], ["1", "6"]])
    (suspect,) = survey.suspects()
    assert (suspect["character"], suspect["times"]) == ("U+001B", 2)
    size = np.dtype(dtype).itemsize
    assert suspect["first"] == f"0-0.bin, byte {2 * size}"
    assert survey.longest == "0-1.bin, byte 0" or survey.longest == "1-1.bin, byte 0"


def test_unknown_tokens_are_no_characters(runs):
    tokenizer = CharTokenizer("ab")
    assert survey_ids(runs([13, 0, 0, 14, EOS_ID]), tokenizer).suspects() == []


def test_what_does_not_end_is_no_document(runs):
    own = runs([20, 21, EOS_ID, 22], [23, EOS_ID])
    assert [(length, name.split()[-1]) for name, length, _ in documents_of(own)] == [(2, "0"), (1, "0")]


# 32-grams


def naive(train: list[np.ndarray], held_out: list[np.ndarray]) -> float:
    """The share of the held-out runs of 32 ids that are in the set of the training ones, as tuples."""

    def grams(parts):
        return (tuple(ids[i : i + 32].tolist()) for ids in parts for i in range(len(ids) - 31))

    known = set(grams(train))
    looked_up = [gram in known for gram in grams(held_out)]
    return sum(looked_up) / len(looked_up)


@pytest.mark.parametrize("at_once", [1, 31, 100, 2**16])
@pytest.mark.parametrize("vocabulary", [2, 40, 60_000])
def test_overlap_is_that_of_sets_of_tuples(runs, monkeypatch, at_once, vocabulary):
    rng = np.random.default_rng(at_once + vocabulary)
    train = [rng.integers(0, vocabulary, size) for size in (900, 31, 400)]
    held_out = [rng.integers(0, vocabulary, size) for size in (300, 32, 10, 500)]
    held_out[0][50:140] = train[2][20:110]
    held_out[3][:40] = train[0][-40:]
    held_out[3][200:300] = 1  # one run of 32, many times
    train[0][100:150] = 1
    monkeypatch.setattr(overlap_module, "AT_ONCE", at_once)
    monkeypatch.setattr("gptlab.data.tokens.BLOCK_BYTES", 74)
    found = overlap(runs(*train), runs(*held_out))
    assert found.share == naive(train, held_out)
    assert 0.15 < found.share < 0.4
    assert (found.runs, found.looked_at) == (269 + 1 + 469,) * 2
    assert tuple(found.example.tolist()) in {tuple(ids[i : i + 32].tolist()) for ids in train for i in range(len(ids))}


def test_nothing_in_common_and_everything(runs):
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 9000, 3000), rng.integers(0, 9000, 3000)
    assert overlap(runs(one), runs(other)).share == 0
    assert overlap(runs(one), runs(other)).example is None
    assert overlap(runs(one), runs(one[500:900])).share == 1
    assert overlap(runs(one), runs(one[:31])) is None


def test_a_sample_of_a_large_split_is_chosen_by_hash_and_close(runs):
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 9000, 60_000), rng.integers(0, 9000, 60_000)
    held_out[:20_000] = train[7000:27_000]
    whole, sample = (overlap(runs(train), runs(held_out), most) for most in (10**6, 6000))
    assert whole.looked_at == whole.runs == sample.runs == 60_000 - GRAM + 1
    assert 3000 < sample.looked_at < 6000
    assert sample.share == pytest.approx(whole.share, abs=0.03)


def test_the_hashes_are_of_runs_alone():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**32, 5000)
    hashes = gram_hashes(ids)
    assert len(hashes) == len(np.unique(hashes)) == 5000 - GRAM + 1
    assert np.array_equal(gram_hashes(ids[100:200]), hashes[100:169])
    flipped = ids.copy()
    flipped[2500] ^= 1
    assert np.flatnonzero(gram_hashes(flipped) != hashes).tolist() == list(range(2500 - GRAM + 1, 2501))

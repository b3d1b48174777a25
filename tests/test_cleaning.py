"""Cleaning leaves out what it says and nothing else, and source code is found by its ending or its first line."""

import random
import unicodedata
from pathlib import Path

import pytest
from conftest import REPOSITORY, compose, door

from gptlab.config import absolute_paths
from gptlab.data import formats
from gptlab.data.cleaning import Cleaned, Cleaning, near
from gptlab.data.code import ENDINGS, Code
from gptlab.data.corpus import Files
from gptlab.data.formats import Reading
from gptlab.data.module import DataConfig, TextDataModule
from gptlab.data.tokens import prepare
from gptlab.tokenizer import ByteTokenizer


def words(count: int, seed: int) -> list[str]:
    return random.Random(seed).choices([f"word{n}" for n in range(2000)], k=count)


def clean(**changes) -> Cleaning:
    nothing = {"normalize": None, "min_characters": 0, "deduplicate": None, "similarity": 0.8}
    return Cleaning(**nothing | changes)


def lines(path: Path, texts: list[str], **cleaning) -> list[str]:
    path.write_text("\n".join(texts))
    source = Cleaned(Files(str(path), Reading(documents="line")), clean(**cleaning))
    found = [document.text for document in source.documents()]
    assert found == [document.text for document in source.documents()], "a second reading knows nothing of the first"
    return found


def test_exact_copies_are_left_out(tmp_path):
    assert lines(tmp_path / "a", ["one two", "three", "one  two ", "One two", "three"], deduplicate="exact") == [
        *("one two", "three", "One two")
    ]


def test_near_copies_are_left_out_and_others_stay(tmp_path):
    originals = [words(300, seed) for seed in range(20)]
    copies = [[*text[:150], "changed", *text[151:]] for text in originals]  # 5 of 296 runs are others: 0.97
    halves = [[*text[:150], *words(150, 99 + seed)] for seed, text in enumerate(originals)]  # about 0.33
    texts = [" ".join(text) for text in (*originals, *copies, *halves)]
    assert lines(tmp_path / "a", texts, deduplicate="near") == texts[:20] + texts[40:]
    assert lines(tmp_path / "a", texts, deduplicate="near", similarity=0.15) == texts[:20]


def test_texts_without_words_are_near_copies_only_where_they_are_exact_ones(tmp_path):
    signs = ["1 2 3", "---", "\U0001f600 \U0001f601", "+ - *", "-  --", "---", "+  - *", "\U0001f600"]
    assert lines(tmp_path / "a", signs, deduplicate="near") == [*signs[:5], signs[7]]


def test_near_agrees_with_the_measure_that_it_estimates():
    def runs(text: list[str]) -> set[str]:
        return {" ".join(text[i : i + 5]) for i in range(len(text) - 4)}

    for changed in (5, 60, 150, 250):
        one = words(300, changed)
        other = one[:-changed] + words(changed, 7)
        jaccard = len(runs(one) & runs(other)) / len(runs(one) | runs(other))
        for similarity in (jaccard - 0.15, jaccard + 0.15):  # three and a half standard errors of 128 hashes
            if 0 < similarity <= 1:
                is_copy = near(similarity)
                assert not is_copy(" ".join(one))
                assert is_copy(" ".join(other)) == (similarity < jaccard)


def test_normal_forms_and_short_documents(tmp_path):
    decomposed = "e\u0301 \ufb01"
    assert lines(tmp_path / "a", [decomposed, "abc", "  ab  "], normalize="NFC", min_characters=3) == [
        "\u00e9 \ufb01",
        "abc",
    ]
    assert lines(tmp_path / "a", [decomposed], normalize="NFKC") == [unicodedata.normalize("NFKC", decomposed)]


def test_a_document_in_parts_is_cleaned_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "WHOLE_BYTES", 10)
    monkeypatch.setattr(formats, "PART_BYTES", 20)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("e\u0301" * 50)
    files = Files(f"{tmp_path}/*.txt")
    assert len(list(files.documents())) > 4
    (document,) = Cleaned(files, clean(normalize="NFC", deduplicate="exact")).documents()
    assert document.text == "\u00e9" * 50
    assert document.ends


@pytest.mark.parametrize(
    "cleaning", [{"normalize": "nfc"}, {"deduplicate": "fuzzy"}, {"min_characters": -1}, {"similarity": 0}]
)
def test_what_cannot_be_is_refused_by_name(cleaning):
    ((name, value),) = cleaning.items()
    with pytest.raises(ValueError, match=rf"^data.{name}={value!r}"):
        clean(**cleaning)


def test_the_cache_knows_how_text_was_cleaned(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"line {n % 150}" for n in range(400)))
    source = Files(f"{tmp_path}/a.txt", Reading(documents="line"))
    made = [
        prepare(cleaned, ByteTokenizer(), validation_fraction=0.1, cache=tmp_path)
        for cleaned in (
            source,
            Cleaned(source, clean(deduplicate="exact")),
            Cleaned(source, clean(min_characters=8)),
        )
    ]
    assert len({prepared.folder for prepared in made}) == 3
    assert [sum(side["documents"] for side in prepared.meta["splits"].values()) for prepared in made] == [400, 150, 100]


TREE = {
    "main.py": "print(1)\n",
    "tools/run.sh": "ls\n",
    "tools/go": "#!/usr/bin/env python3\nprint(2)\n",
    "tools/do": "#!/bin/sh\nls\n",
    "tools/other": "#!/usr/bin/perl\n",
    "notes": "python\n",
    "page.html": "<p>\n",
    "empty.py": "",
    "large.py": "1\n" * 1000,
    ".git/hook.py": "1\n",
    "build/made.py": "1\n",
    "deep/node_modules/a/b.py": "1\n",
}


@pytest.fixture
def tree(tmp_path) -> Path:
    for name, text in TREE.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "tree/link.py").symlink_to("main.py")
    (tmp_path / "tree/latin.py").write_bytes(b"# \xe9\n")
    return tmp_path / "tree"


def test_code_is_what_its_ending_or_first_line_says(tree):
    def names(*languages: str) -> set[str]:
        source = Code(str(tree), languages, max_bytes=1000)
        found = {document.name: document.text for document in source.documents()}
        assert all(TREE[name] == text for name, text in found.items())
        return set(found)

    assert names("python", "bash") == {"main.py", "tools/run.sh", "tools/go", "tools/do"}
    assert names("bash") == {"tools/run.sh", "tools/do"}
    assert names("perl") == {"tools/other"}
    with pytest.raises(ValueError, match=r"data.source.folders=.* hold no file in rust; name other folders"):
        names("rust")
    with pytest.raises(ValueError, match=r"data.source.languages=\['cobol'\]: known are bash, c, "):
        names("cobol")
    with pytest.raises(ValueError, match=r"data.source.folders: nowhere is no folder here"):
        Code("nowhere", ["python"], max_bytes=1).paths()
    assert len({ending for endings in ENDINGS.values() for ending in endings}) == sum(map(len, ENDINGS.values()))


def test_folders_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = absolute_paths(compose("data=code", "data.source.folders=[src,'~/more']"))
    assert cfg["data"]["source"]["folders"] == [str(tmp_path / "src"), str(Path.home() / "more")]


def test_own_code_is_prepared_from_the_command_line():
    done = door("prepare", "data=code", "tokenizer=byte", "data.source.folders=gptlab", cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "a hash of the document" in " ".join(done.stdout.replace("\n", " ").split()) or "tail" in done.stdout


@pytest.mark.parametrize("deduplicate", ["exact", "near"])
def test_copies_of_held_out_text_leave_training(tmp_path, deduplicate):
    """And the cache knows: other held-out text, other training text."""
    own, other = [" ".join(words(30, seed)) for seed in range(120)], [" ".join(words(30, seed)) for seed in (900, 901)]
    (tmp_path / "own.txt").write_text("\n".join(own))
    (tmp_path / "held.txt").write_text("\n".join([*own[40:43], other[0]]))
    files = {"files": str(tmp_path / "own.txt"), "validation_files": str(tmp_path / "held.txt"), "documents": "line"}
    found = {}
    for how in (None, deduplicate):
        data = TextDataModule(DataConfig(**files, deduplicate=how), None, ByteTokenizer(), 16, 1, tmp_path / "cache")
        data.prepare_data()
        found[how] = data.prepared.meta["splits"]["train"]["documents"]
        assert data.prepared.meta["splits"]["validation"]["documents"] == 4
    assert found == {None: 120, deduplicate: 117}
    (tmp_path / "held.txt").write_text("\n".join(other))
    data = TextDataModule(
        DataConfig(**files, deduplicate=deduplicate), None, ByteTokenizer(), 16, 1, tmp_path / "cache"
    )
    data.prepare_data()
    assert data.prepared.meta["splits"]["train"]["documents"] == 120


def test_a_side_of_which_nothing_is_left_is_said(tmp_path):
    for name in ("own", "held"):
        (tmp_path / f"{name}.txt").write_text(f"a few words of {name}\n")
    files = {"files": str(tmp_path / "own.txt"), "validation_files": str(tmp_path / "held.txt")}
    data = TextDataModule(DataConfig(**files, min_characters=1000), None, ByteTokenizer(), 4, 1, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no text is left for train: .*lower data.min_characters"):
        data.prepare_data()

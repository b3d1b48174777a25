"""Tokens on disk: they are the text, split; built once, whatever else runs or dies; and never half there."""

import errno
import functools
import json
import logging
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from gptlab.data import batches, encoding, tokens
from gptlab.data.changes import differences
from gptlab.data.cleaning import Cleaned, Cleaning
from gptlab.data.corpus import Files, Source
from gptlab.data.document import Document
from gptlab.data.tokens import TokenFile, open_prepared, prepare
from gptlab.data.windows import WindowDataset, report
from gptlab.data.workers import Workers, processes
from gptlab.files import cache_dir
from gptlab.tokenizer import EOS_ID, N_SPECIAL, ByteTokenizer, CharTokenizer, SentencePieceTokenizer, load_tokenizer

fork = multiprocessing.get_context("fork")  # a child starts with this module's patches, and in no time
ALPHABET = "abcdefghij"


def number(i: int) -> str:
    """A word that stands for `i` and is no part of another."""
    return "<" + "".join(ALPHABET[int(digit)] for digit in str(i)) + ">"


@pytest.fixture
def corpus(tmp_path):
    """Writes n files of numbered words that occur once, and returns them as a source."""

    def write(n_files: int, words: int = 40) -> Files:
        folder = tmp_path / f"corpus-{n_files}"
        folder.mkdir(exist_ok=True)
        for i in range(n_files):
            (folder / f"{i:04}.txt").write_text("\u00e9\n" + "".join(number(i * words + j) + " " for j in range(words)))
        return Files(f"{folder}/*.txt")

    return write


def build(source: Source, cache: Path, build_tokenizer=ByteTokenizer.train, **changes):
    return prepare(source, build_tokenizer, **{"validation_fraction": 0.1, "cache": cache} | changes)


def texts(file: TokenFile, tokenizer) -> list[str]:
    ids = file[:]
    assert ids[-1] == EOS_ID
    ends = np.flatnonzero(ids == EOS_ID)
    return [tokenizer.decode(piece[piece != EOS_ID]) for piece in np.split(ids, ends[:-1] + 1)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [ByteTokenizer, CharTokenizer])
@pytest.mark.parametrize("n_files", [1, 3, 120])
def test_the_files_are_the_source_and_no_word_is_on_both_sides(corpus, tmp_path, kind, n_files):
    source = corpus(n_files)
    prepared = build(source, tmp_path, kind.train)
    train, validation = (texts(file, prepared.tokenizer) for file in (prepared.train, prepared.validation))
    whole = [document.text for document in source.documents()]
    if n_files == 120:
        assert sorted(train + validation) == sorted(whole)
        assert not set(train) & set(validation)
    else:
        assert [a + b for a, b in zip(train, validation, strict=True)] == whole
    words = [{number(i) for i in range(40 * n_files)} & set("".join(side).split()) for side in (train, validation)]
    assert words[0]
    assert words[1]
    assert not words[0] & words[1]


def test_meta_tells_what_is_in_the_files(corpus, tmp_path):
    source = corpus(3)
    prepared = build(source, tmp_path)
    meta = json.loads((prepared.folder / "meta.json").read_text())
    assert meta == prepared.meta
    assert sum(split["bytes"] for split in meta["splits"].values()) == sum(
        len(d.text.encode()) for d in source.documents()
    )
    for side, file in (("train", prepared.train), ("validation", prepared.validation)):
        split = meta["splits"][side]
        assert split["documents"] == 3
        assert split["tokens"] == len(file) == split["bytes"] + 3  # one for each byte, and three ends
        assert split["sha256"] == tokens.sha256_of_file(file.path)
        assert split["coverage"] == 1
    assert meta["dtype"] == "<u2"
    assert meta["split"] == {"rule": "tail", "fraction": 0.1}
    assert meta["tokenizer_fingerprint"] == ByteTokenizer().fingerprint
    assert meta["eos_id"] == EOS_ID
    assert [Path(file["path"]) for file in meta["files"]["source"]] == source.paths()


def test_the_tokenizer_learns_from_training_text_alone(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 90 + "z" * 10)
    prepared = build(Files(f"{tmp_path}/a.txt"), tmp_path, CharTokenizer.train)
    assert prepared.tokenizer.characters == "a"
    assert prepared.meta["splits"]["train"]["coverage"] == 1
    assert prepared.meta["splits"]["validation"]["coverage"] == 0
    assert prepared.meta["splits"]["train"]["unknown_tokens"] == 0
    assert prepared.meta["splits"]["validation"]["unknown_tokens"] == 10


def test_a_sentencepiece_tokenizer_is_trained_with_its_settings_and_kept(corpus, tmp_path, monkeypatch):
    settings = {"vocab_size": 320, "model_type": "bpe", "character_coverage": 1.0, "max_train_bytes": 10**6}
    trained = functools.partial(SentencePieceTokenizer.train, **settings)
    first = build(corpus(3), tmp_path, trained)
    assert first.tokenizer.vocab_size == 320
    larger = build(corpus(3), tmp_path, functools.partial(trained, vocab_size=330))
    assert larger.tokenizer.vocab_size == 330
    monkeypatch.setattr(SentencePieceTokenizer, "train", None)
    assert build(corpus(3), tmp_path, trained).folder == first.folder


def test_a_given_tokenizer_is_used_as_it_is(corpus, tmp_path):
    prepared = build(corpus(1), tmp_path, CharTokenizer("<>a"))
    assert prepared.tokenizer.characters == "<>a"
    assert prepared.meta["splits"]["train"]["coverage"] < 1
    assert build(corpus(1), tmp_path, prepared.tokenizer).folder == prepared.folder


def test_validation_files_leave_all_of_the_source_for_training(corpus, tmp_path):
    (tmp_path / "held-out.txt").write_text("held out")
    source, validation = corpus(3), Files(f"{tmp_path}/held-out.txt")
    prepared = build(source, tmp_path, validation_source=validation)
    assert texts(prepared.train, prepared.tokenizer) == [document.text for document in source.documents()]
    assert texts(prepared.validation, prepared.tokenizer) == ["held out"]
    assert prepared.meta["split"] == {"rule": "source", "fraction": None}
    with pytest.raises(ValueError, match=r"0001.txt is validation text, and the same as .*0001.txt"):
        build(source, tmp_path, validation_source=Files(str(source.paths()[1])))


class Numbers(Source):
    """A source of its own making: documents that the file's bytes do not tell alone."""

    def __init__(self, path: Path, upper: bool = False):
        self.path, self.upper = path, upper

    def paths(self):
        return [self.path]

    def read(self, path):
        yield Document("numbers", path.read_text().upper() if self.upper else path.read_text())

    @property
    def settings(self):
        return {"upper": self.upper}


def test_the_cache_knows_what_changes_the_tokens(corpus, tmp_path):
    source = corpus(3)
    path = source.paths()[0]
    folder = build(source, tmp_path).folder
    assert build(corpus(3), tmp_path).folder == folder
    others = [
        build(source, tmp_path, CharTokenizer.train).folder,
        build(source, tmp_path, validation_fraction=0.2).folder,
        build(Files([str(p) for p in source.paths()[::-1]]), tmp_path).folder,
        build(Numbers(path), tmp_path).folder,
        build(Numbers(path, upper=True), tmp_path).folder,
        build(Files(str(path)), tmp_path).folder,
    ]
    path.write_text(path.read_text().replace("<a>", "<x>"))
    others.append(build(source, tmp_path).folder)
    assert len({folder, *others}) == 1 + len(others)
    path.write_text(path.read_text().replace("<x>", "<a>"))
    moved = tmp_path / "moved"
    source.paths()[0].parent.rename(moved)
    assert build(Files(f"{moved}/*.txt"), tmp_path).folder == folder  # the bytes count, not where they are


@pytest.mark.parametrize("wrap", [lambda source: source, lambda source: Cleaned(source, Cleaning("NFC", 0, None, 0.8))])
def test_the_cache_knows_how_a_name_says_that_its_file_is_read(tmp_path, wrap):
    content = "".join(f'{{"text": "line {n}"}}\n' for n in range(200))

    def made(name: str):
        (tmp_path / name).write_text(content)
        return build(wrap(Files(f"{tmp_path}/{name}")), tmp_path, CharTokenizer.train)

    plain, rows = made("a.txt"), made("a.jsonl")
    assert "{" in plain.tokenizer.characters
    assert "{" not in rows.tokenizer.characters
    assert rows.meta["splits"]["train"]["documents"] > 100
    assert made("b.md").folder == plain.folder, "other endings of plain text say nothing"


def test_fingerprint_is_of_the_tokens_and_their_meaning(corpus, tmp_path):
    first = build(corpus(3), tmp_path / "one")
    assert build(corpus(3), tmp_path / "two").fingerprint == first.fingerprint
    assert open_prepared(first.folder).fingerprint == first.fingerprint
    assert build(corpus(3), tmp_path / "one", validation_fraction=0.2).fingerprint != first.fingerprint
    assert build(corpus(3), tmp_path / "one", CharTokenizer.train).fingerprint != first.fingerprint


def test_a_side_without_text_is_an_error_with_a_remedy(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"no text is left for validation: data.validation_fraction=1e-09 .* raise it"):
        build(corpus(120), tmp_path, validation_fraction=1e-9)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no text is left for train: .* lower it"):
        build(Files(f"{tmp_path}/a.txt"), tmp_path, CharTokenizer.train)
    assert not [path for path in tmp_path.glob("tokens/*") if path.is_dir()]


def in_processes(n: int, source, cache, kind=ByteTokenizer.train, workers=None) -> list[int]:
    arguments = (source, cache, kind)
    children = [fork.Process(target=build, args=arguments, kwargs={"workers": workers}) for _ in range(n)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def test_of_four_builders_at_once_one_builds(corpus, tmp_path, monkeypatch):
    whole = tokens._build

    def counted(folder, *arguments):
        with open(tmp_path / "builds", "a") as file:
            file.write("built\n")
        whole(folder, *arguments)

    monkeypatch.setattr(tokens, "_build", counted)
    source = corpus(120)
    assert in_processes(4, source, tmp_path / "four") == [0, 0, 0, 0]
    assert (tmp_path / "builds").read_text() == "built\n"
    alone, four = build(source, tmp_path / "one"), build(source, tmp_path / "four")
    assert contents(alone.folder) == contents(four.folder)


@pytest.mark.parametrize("place", ["in the text", "before the meta file"])
def test_a_killed_build_is_begun_again_and_gives_the_same_bytes(corpus, tmp_path, caplog, place):
    source = corpus(120)
    alone = build(source, tmp_path / "one")

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        if place == "in the text":
            add = encoding._Writer.add
            patch.setattr(batches, "BATCH_CHARACTERS", 1)
            patch.setattr(encoding._Writer, "add", lambda w, part: die() if w.sums["documents"] == 20 else add(w, part))
        else:
            patch.setattr(tokens, "write_json", die)
        assert in_processes(1, source, tmp_path / "killed") == [-signal.SIGKILL]
    (folder,) = (path for path in (tmp_path / "killed" / "tokens").iterdir() if path.is_dir())
    assert (folder / "train.bin").exists()
    (folder / ".meta.json.tmp.123").write_text("{")  # as if it had died in that very write
    with pytest.raises(ValueError, match=r"no complete prepared data .* prepare it again"):
        open_prepared(folder)
    again = build(source, tmp_path / "killed")
    assert again.folder == folder
    assert contents(again.folder) == contents(alone.folder)
    assert "unfinished" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_build_goes_on_where_it_was_killed(corpus, tmp_path, caplog, monkeypatch, workers):
    """Six times in a row, each a few documents further on; the bytes are those of one that nobody killed."""
    source, steps = corpus(120), 6
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 1000)
    alone = build(source, tmp_path / "one", workers=0)
    monkeypatch.setattr(encoding, "JOURNAL_SECONDS", 0)
    encoded_before, written = Workers.encoded, tmp_path / "batches"

    def encoded(self, todo):
        for number, batch in enumerate(encoded_before(self, todo)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            with open(written, "a") as file:
                file.write("batch\n")
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "encoded", encoded)
        for _ in range(steps):
            assert in_processes(1, source, tmp_path / "killed", ByteTokenizer.train, workers) == [-signal.SIGKILL]
    with caplog.at_level(logging.INFO, "gptlab"):
        again = build(source, tmp_path / "killed", workers=workers)
    assert contents(again.folder) == contents(alone.folder)
    assert len(written.read_text().splitlines()) == 3 * steps, "a batch was encoded again"
    assert "going on with tokens that were begun" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "flip", "journal"])
def test_what_a_killed_build_left_is_believed_only_where_it_agrees(corpus, tmp_path, monkeypatch, damage):
    source = corpus(120)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 1000)
    alone = build(source, tmp_path / "one", workers=0)
    monkeypatch.setattr(encoding, "JOURNAL_SECONDS", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding._Writer, "report", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_processes(1, source, tmp_path / "killed") == [-signal.SIGKILL]
    (journal,) = (tmp_path / "killed" / "tokens").rglob(encoding.JOURNAL)
    train = journal.with_name("train.bin")
    content = train.read_bytes()
    if damage == "journal":
        journal.write_text(journal.read_text()[:-9])
    else:
        train.write_bytes(content[:100] + (b"" if damage == "cut" else bytes([content[100] ^ 1]) + content[101:]))
    assert contents(build(source, tmp_path / "killed").folder) == contents(alone.folder)


@pytest.mark.parametrize("kind", [ByteTokenizer, CharTokenizer])
def test_processes_write_the_same_bytes(corpus, tmp_path, monkeypatch, kind):
    source = corpus(120)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 500)
    folders = [build(source, tmp_path / str(n), kind.train, workers=n).folder for n in (0, 1, 3)]
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])


def test_a_process_that_dies_is_told(corpus, tmp_path, monkeypatch):
    before = Workers.__enter__

    def enter(self):
        before(self)
        for worker in self.all:
            worker.kill()
        return self

    monkeypatch.setattr(Workers, "__enter__", enter)
    with pytest.raises(RuntimeError, match=r"a process that encodes text has ended with exit code -9.* start again"):
        build(corpus(3), tmp_path, workers=2)


@pytest.mark.parametrize("size", [0, 7, 30])
def test_a_process_whose_asker_dies_ends_without_a_word(corpus, tmp_path, size):
    folder = build(corpus(1), tmp_path).folder / "tokenizer"
    command = [sys.executable, "-m", "gptlab.data.workers", str(folder), "<u2"]
    message = struct.pack("<QQ", 100, 0) + b'[["train", "half of a '
    done = subprocess.run(command, input=message[:size], capture_output=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_as_many_processes_as_are_worth_it():
    assert processes(None, 10**6) == 0
    assert processes(None, 10**9) in (0, len(os.sched_getaffinity(0)))
    assert processes(3, 10) == 3


@pytest.mark.parametrize("damage", ["train.bin", "validation.bin", "meta.json", "tokenizer/gptlab_tokenizer.json"])
@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(corpus, tmp_path, caplog, damage, how):
    source = corpus(2)
    prepared = build(source, tmp_path)
    before = contents(prepared.folder)
    caplog.clear()
    build(source, tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    path = prepared.folder / damage
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    assert build(source, tmp_path).folder == prepared.folder
    assert contents(prepared.folder) == before
    assert "building anew what is damaged" in caplog.text


def test_a_damaged_tokenizer_is_trained_again(corpus, tmp_path):
    prepared = build(corpus(2), tmp_path, CharTokenizer.train)
    (folder,) = (path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir())
    (folder / "gptlab_tokenizer.json").write_text("{")
    assert build(corpus(2), tmp_path, CharTokenizer.train).folder == prepared.folder
    assert load_tokenizer(folder).fingerprint == prepared.tokenizer.fingerprint


def test_a_full_disk_is_told_and_nothing_is_left(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(encoding.os, "fsync", full)
        with pytest.raises(OSError, match=r"no space for .*tokens.*; free some space, or set GPTLAB_CACHE_DIR"):
            build(corpus(2), tmp_path)
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 100)
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"no space for .*the tokens need about .* set GPTLAB_CACHE_DIR"):
        build(corpus(2), tmp_path)
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/tokenizers .* set GPTLAB_CACHE_DIR"):
        build(corpus(1), tmp_path / "file")


def write_ids(path: Path, ids, dtype: str = "<u2") -> TokenFile:
    np.asarray(ids, dtype=dtype).tofile(path)
    return TokenFile(path, dtype, len(ids))


def test_token_file_reads_what_was_written(tmp_path):
    ids = np.arange(65536)
    for dtype in ("<u2", "<u4"):
        file = write_ids(tmp_path / dtype[1:], ids, dtype)
        assert len(file) == 65536
        assert type(file[5:9]) is np.ndarray
        np.testing.assert_array_equal(file[:], ids)
        np.testing.assert_array_equal(file[np.array([[7, 3], [65535, 0]])], [[7, 3], [65535, 0]])
    with pytest.raises(ValueError, match=r"read-only"):
        file[:][0] = 1


def test_token_file_of_another_size_is_refused(tmp_path):
    write_ids(tmp_path / "train.bin", range(10))
    with pytest.raises(ValueError, match=r"train.bin should hold 22 bytes and holds 20; delete its folder"):
        TokenFile(tmp_path / "train.bin", "<u2", 11)
    with pytest.raises(ValueError, match=r"none.bin should hold 22 bytes and holds no"):
        TokenFile(tmp_path / "none.bin", "<u2", 11)


def test_token_file_travels_to_workers_without_its_tokens(tmp_path):
    file = write_ids(tmp_path / "train.bin", range(50000))
    assert file[49999] == 49999
    content = pickle.dumps(file)
    assert len(content) < 1000
    assert pickle.loads(content)[49999] == 49999


@pytest.mark.parametrize(("block_size", "stride"), [(8, 8), (8, 4), (7, 3), (100, 1), (10_000, 5)])
def test_report_counts_windows_as_they_fall(corpus, tmp_path, block_size, stride):
    prepared = build(corpus(3), tmp_path)
    train = WindowDataset(prepared.train, block_size, stride)
    validation = WindowDataset(prepared.validation, block_size, block_size, keep_tail=True)
    rows = report(prepared.meta["splits"], train=train, validation=validation)
    n = len(prepared.train)
    starts = [start for start in range(0, n, stride) if start + block_size + 1 <= n]
    assert rows["train"]["windows"] == len(starts)
    assert rows["train"]["dropped_tokens"] == (n - (starts[-1] + block_size + 1) if starts else n)
    assert rows["validation"]["windows"] == len(range(0, len(prepared.validation) - 1, block_size))
    assert rows["validation"]["dropped_tokens"] == 0
    assert rows["train"]["bytes_per_token"] == pytest.approx(rows["train"]["bytes"] / n)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    characters = "".join(map(chr, [*range(0x4E00, 0xD800), *range(0xE000, 0xFFFF), *range(0x10000, 0x1A000)]))
    (tmp_path / "a.txt").write_text(characters[-100:], encoding="utf-8")
    prepared = build(Files(f"{tmp_path}/a.txt"), tmp_path, CharTokenizer(characters))
    assert prepared.meta["dtype"] == "<u4"
    assert prepared.train[0] == N_SPECIAL + len(characters) - 100
    assert "".join(texts(prepared.train, prepared.tokenizer)) == characters[-100:-10]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("GPTLAB_CACHE_DIR")
    assert cache_dir() == Path.home() / ".cache" / "gptlab"


def test_files_that_changed_are_told_from_those_that_moved():
    then = [(f"/then/{name}", name) for name in "abcd"]
    assert differences(then, [(f"/now/{name}", name) for name in "abcd"]) == ""
    now = [("/now/a", "a"), ("/now/b", "other"), ("/now/e", "e"), ("/now/d", "d")]
    assert differences(then, now) == "changed: /now/b; missing: /then/c; new: /now/e"
    assert differences(then, then[::-1]) == "the files are the same, in another order"
    then, now = [("de/text", "a"), ("en/text", "b")], [("en/text", "other")]  # two of one name
    assert differences(then, now) == "changed: en/text; missing: de/text"


class Writing(Files):
    """Files to one of which somebody writes while they are read."""

    def __init__(self, files: str, change, reading: int):
        super().__init__(files)
        self.change, self.reading_left = change, reading

    def documents(self):
        self.reading_left -= 1
        for number, document in enumerate(super().documents()):
            if number == 1 and self.reading_left == 0:
                self.change()
            yield document


@pytest.mark.parametrize("reading", [1, 2, 4])  # the third only looks at the first document
@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_a_text_that_changes_while_it_is_read_poisons_no_cache(corpus, tmp_path, change, reading):
    """By whichever reading: for the rule of the split, for the tokenizer, or for the tokens."""
    source = corpus(3)
    path = source.paths()[2]
    before = path.read_text()
    os.utime(path, (1, 1))  # written some time before
    changed = before.replace("<a>", "<b>") if change == "replace" else before + "<abc>"
    act = path.unlink if change == "remove" else lambda: path.write_text(changed)
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=rf"{path}"):
        build(Writing(source.files[0], act, reading), cache, CharTokenizer.train)
    assert not list(cache.rglob("meta.json"))
    path.write_text(before)
    clean = build(source, tmp_path / "clean", CharTokenizer.train)
    again = build(Writing(source.files[0], act, 0), cache, CharTokenizer.train)
    assert contents(again.folder / "tokenizer") == contents(clean.folder / "tokenizer")
    assert again.fingerprint == clean.fingerprint


@pytest.mark.parametrize("which", ["validation_source", "tokenizer_source"])
def test_other_text_that_changes_while_it_is_read_is_named_too(corpus, tmp_path, which):
    (tmp_path / "other").mkdir()
    for name in "ab":
        (tmp_path / f"other/{name}.txt").write_text(f"other text {name}")
        os.utime(tmp_path / f"other/{name}.txt", (1, 1))
    changed = tmp_path / "other/a.txt"
    other = Writing(f"{tmp_path}/other/*.txt", lambda: changed.write_text("something else"), 1)
    with pytest.raises(ValueError, match=f"{changed} changed while it was read"):
        build(corpus(3), tmp_path / "cache", CharTokenizer.train, **{which: other})
    assert not list((tmp_path / "cache").rglob("gptlab_tokenizer.json")) or which == "validation_source"

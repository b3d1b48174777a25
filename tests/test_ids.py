"""Ids that are there already train as their text would: split without leaks, checked, never copied."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, SMALL, compose, door, prose
from test_shards import write_shard
from trials import differences

from gptlab.data import checking, ids
from gptlab.data.ids import count_ids, cut_of, prepare_ids
from gptlab.data.module import DataConfig, TextDataModule
from gptlab.data.shards import open_shards
from gptlab.data.tokens import prepare
from gptlab.data.windows import WindowDataset, windows_in
from gptlab.tokenizer import EOS_ID, ByteTokenizer, CharTokenizer

T = 8


class Wide(ByteTokenizer):
    """As many ids as a test has tokens, so that each is found at one position only; each is a byte of text."""

    vocab_size = 60_000

    def decode_bytes(self, ids) -> bytes:
        return b"x" * len(ids)


@pytest.fixture
def shards(tmp_path):
    """`shards(n, tokens)` writes n shards in which no id comes twice; documents have 10 to 29 tokens, or all."""

    def write(count: int, tokens: int = 200, first: int = 10, long_documents: bool = False) -> str:
        folder, rng = tmp_path / f"shards-{count}-{first}", np.random.default_rng(count)
        folder.mkdir()
        for number in range(count):
            own = np.arange(first + number * tokens, first + (number + 1) * tokens)
            if not long_documents:
                own[np.cumsum(rng.integers(10, 30, tokens)) % tokens] = EOS_ID
            own[-1] = EOS_ID
            write_shard(folder / f"{number:03}.bin", own, vocab_size=Wide.vocab_size)
        return f"{folder}/*.bin"

    return write


def prepared(files, cache: Path, tokenizer=None, **changes):
    return prepare_ids(files, tokenizer or Wide(), **{"validation_fraction": 0.1, "cache": cache} | changes)


def ids_in(side) -> list[int]:
    """All of a side but the ends of documents, in order."""
    return [i for part in side.parts for i in part[:].tolist() if i != EOS_ID]


def all_ids(folder: Path) -> list[int]:
    return sorted(i for shard in open_shards(f"{folder}/*") for i in shard.ids[:].tolist() if i != EOS_ID)


def shown(side, stride: int, keep_tail: bool = False) -> list[list[int]]:
    """Every window of a side, as its ids."""
    windows = windows_in(side, partial(WindowDataset, block_size=T, stride=stride, keep_tail=keep_tail))
    rows = []
    for number in range(len(windows)):
        window = windows[number]
        seen = [window["tokens"][0].item(), *window["targets"][window["loss_mask"]].tolist()]
        rows.append(seen)
    return rows


@pytest.mark.parametrize(
    ("count", "long_documents"), [(1, False), (1, True), (7, False), (7, True), (99, False), (100, True), (230, False)]
)
def test_no_id_that_is_held_out_is_trained_on_and_no_window_crosses_files_or_sides(
    tmp_path, shards, count, long_documents
):
    data = prepared(shards(count, long_documents=long_documents), tmp_path / "cache")
    assert data.meta["split"]["rule"] == ("tail of file" if count < 100 else "hash of file")
    train, held_out = (ids_in(side) for side in (data.train, data.validation))
    assert sorted(train + held_out) == all_ids(tmp_path / f"shards-{count}-10")
    trained = {i for window in shown(data.train, T // 2) for i in window} - {EOS_ID}
    scored = {i for window in shown(data.validation, T, keep_tail=True) for i in window} - {EOS_ID}
    assert trained
    assert not trained & set(held_out)
    assert scored == set(held_out) if count < 100 else scored <= set(held_out)
    for window in shown(data.train, T // 2):  # where no document ended there, ids follow each other
        assert all(b - a == 1 for a, b in itertools.pairwise(window) if EOS_ID not in (a, b))
    share = len(held_out) / (len(train) + len(held_out))
    assert share == pytest.approx(0.1, abs=0.05)


def test_every_target_of_validation_is_scored_once(tmp_path, shards):
    data = prepared(shards(20), tmp_path / "cache")
    scored = [i for window in shown(data.validation, T, keep_tail=True) for i in window[1:]]
    assert sorted(scored) == sorted(i for part in data.validation.parts for i in part[1:].tolist())


def test_a_shard_stays_on_its_side_when_others_come_and_when_it_is_renamed(tmp_path, shards):
    files = shards(120)
    data = prepared(files, tmp_path / "cache")
    before = {side: set(ids_in(getattr(data, side))) for side in ("train", "validation")}
    folder = Path(files).parent
    for path in sorted(folder.iterdir())[:100]:
        path.rename(folder / f"renamed-{path.name}")
    after = prepared([files, shards(60, first=30_000)], tmp_path / "cache")
    for side, known in before.items():
        assert known <= set(ids_in(getattr(after, side)))


@pytest.mark.parametrize(
    ("ends", "cut"),
    [
        ([99], 90),  # none but the last: through the document
        ([92, 99], 93),  # after the first end in the tail
        ([89, 99], 90),  # it falls there
        ([20, 96, 99], 90),  # too far: half of the tail would be lost
        ([94, 99], 95),
        ([], 90),
    ],
)
def test_the_tail_begins_after_the_end_of_a_document_where_one_is_near(tmp_path, ends, cut):
    own = np.arange(100) + 10
    own[ends] = EOS_ID
    (shard,) = open_shards(str(write_shard(tmp_path / "a.bin", own)))
    assert cut_of(shard.ids, 0.1) == cut


def test_the_tail_is_found_whatever_is_read_at_a_time(tmp_path, shards, monkeypatch):
    files = [str(path) for path in sorted(Path(shards(5)).parent.glob("*.bin"))]
    whole = prepared(files, tmp_path / "one")
    monkeypatch.setattr("gptlab.data.tokens.BLOCK_BYTES", 6)
    monkeypatch.setattr("gptlab.data.checking.COUNTED", 2)
    parts = prepared(files, tmp_path / "two")
    assert (whole.meta, whole.fingerprint) == (parts.meta, parts.fingerprint)


def test_what_the_record_says_is_what_there_is(tmp_path, shards):
    data = prepared(shards(9), tmp_path / "cache")
    for side in ("train", "validation"):
        own = np.concatenate([part[:] for part in getattr(data, side).parts])
        split = data.meta["splits"][side]
        assert split["tokens"] == len(own) == len(getattr(data, side))
        assert split["documents"] == (own == EOS_ID).sum()
        assert split["bytes"] == len(own)
        assert split["unknown_tokens"] == 0


def test_validation_tokens_are_held_out_whole_and_no_copy_of_training(tmp_path, shards):
    files, own = shards(3), shards(2, first=30_000)
    data = prepared(files, tmp_path / "cache", validation_files=own)
    assert data.meta["split"] == {"rule": "tokens", "fraction": None}
    assert set(ids_in(data.train)) == {i for s in open_shards(files) for i in s.ids[:].tolist()} - {EOS_ID}
    assert set(ids_in(data.validation)) == {i for s in open_shards(own) for i in s.ids[:].tolist()} - {EOS_ID}
    copy = tmp_path / "copy.bin"
    shutil.copy(Path(files).parent / "001.bin", copy)
    shutil.copy(Path(files).parent / "001.bin.json", f"{copy}.json")
    with pytest.raises(ValueError, match=r"copy.bin is held out, and the same as .*001.bin, which is trained on"):
        prepared(files, tmp_path / "cache", validation_files=str(copy))


def test_sides_without_ids_are_refused_with_the_remedy(tmp_path, shards):
    with pytest.raises(ValueError, match=r"no ids are left for validation: data.validation_fraction=1e-05 .* raise it"):
        prepared(shards(100), tmp_path / "cache", validation_fraction=1e-5)
    (path,) = [write_shard(tmp_path / "one.bin", np.array([7]))]
    with pytest.raises(ValueError, match="no ids are left for train"):
        prepared(str(path), tmp_path / "cache", tokenizer=ByteTokenizer())


# What is wrong in the ids


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "npy", "signed"])
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(tmp_path, dtype):
    own = np.full(5000, 50)
    own[4321] = -3 if dtype == "signed" else 269
    path = tmp_path / ("a.bin" if dtype.startswith("<") else "a.npy")
    if dtype.startswith("<"):
        write_shard(path, own, dtype)
        byte = 4321 * int(dtype[2])
    else:
        np.save(path, own.astype("i4"))
        byte = path.stat().st_size - (5000 - 4321) * 4
    said = rf"the id at place 4,321 \(byte {byte:,}\) is {own[4321]}, and the tokenizer has the ids 0 to 268"
    with pytest.raises(ValueError, match=said) as refusal:
        prepared(str(path), tmp_path / "cache", tokenizer=ByteTokenizer())
    assert str(path) in str(refusal.value)
    item = np.dtype("<u4" if dtype == "<u4" else "<u2" if dtype == "<u2" else "i4")
    assert np.frombuffer(path.read_bytes()[byte : byte + item.itemsize], item)[0] == own[4321]


def test_the_largest_id_there_is_may_occur(tmp_path):
    path = write_shard(tmp_path / "a.bin", np.array([268] * 50))
    assert len(prepared(str(path), tmp_path / "cache", tokenizer=ByteTokenizer()).train) == 45


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    mine, theirs = CharTokenizer("abc"), CharTokenizer("abd")
    path = write_shard(tmp_path / "a.bin", np.array([13] * 50), vocab_size=16, tokenizer_fingerprint=theirs.fingerprint)
    with pytest.raises(ValueError, match=r"a.bin was made with the tokenizer") as refusal:
        prepared(str(path), tmp_path / "cache", tokenizer=mine)
    assert mine.fingerprint in str(refusal.value)
    assert theirs.fingerprint in str(refusal.value)
    prepared(str(path), tmp_path / "cache", tokenizer=theirs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "a.bin is damaged, or not the file of its sidecar: its sha256 is"),
        ({"documents": 3}, r"a.bin has 0 ids that end a document \(2\), and by its sidecar 3"),
        ({"vocab_size": 270}, "a.bin is of a vocabulary of 270, and this tokenizer has 269"),
    ],
)
def test_a_sidecar_that_is_not_of_these_ids_is_refused(tmp_path, changes, says):
    path = write_shard(tmp_path / "a.bin", np.array([50] * 50), **changes)
    with pytest.raises(ValueError, match=says):
        prepared(str(path), tmp_path / "cache", tokenizer=ByteTokenizer())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write_shard(tmp_path / "a.bin", np.array([50] * 50))
    (shard,) = open_shards(str(path))
    lengths = np.ones(269, dtype=int)
    with pytest.raises(ValueError, match=r"a.bin changed while it was read"):
        checking.check_shard(shard, None, lengths, lambda size: os.utime(path, (1, 1)))


# What is remembered


def test_files_are_read_once_and_again_when_they_change(tmp_path, shards, monkeypatch):
    files, read = shards(4), []
    check = checking.check_shard
    monkeypatch.setattr(
        checking, "check_shard", lambda shard, *rest: read.append(shard.path.name) or check(shard, *rest)
    )
    first = prepared(files, tmp_path / "cache")
    assert sorted(read) == [f"{number:03}.bin" for number in range(4)]
    assert prepared(files, tmp_path / "cache").meta == first.meta
    assert len(read) == 4
    path = Path(files).parent / "002.bin"
    write_shard(path, np.roll(np.fromfile(path, "<u2"), 1), vocab_size=Wide.vocab_size)
    assert prepared(files, tmp_path / "cache").fingerprint != first.fingerprint
    assert read[4:] == ["002.bin"]
    prepared(files, tmp_path / "cache", again=True)
    assert len(read) == 9
    np.save(tmp_path / "own.npy", np.arange(1000, 2000))  # of the same size, with no sidecar that tells
    before = prepared(str(tmp_path / "own.npy"), tmp_path / "cache")
    np.save(tmp_path / "own.npy", np.arange(2000, 3000))
    assert prepared(str(tmp_path / "own.npy"), tmp_path / "cache").fingerprint != before.fingerprint
    del read[9:]
    for file in (tmp_path / "cache/shards").glob("*.json"):
        file.write_text("{")
    prepared(files, tmp_path / "cache")
    assert len(read) == 13


def test_damage_is_found_by_reading_again_if_nothing_else_tells(tmp_path, shards):
    """The size and time of a file are what it is known by: a bit that flips on the disk changes neither."""
    files = shards(1)
    prepared(files, tmp_path / "cache")
    (path,) = Path(files).parent.glob("*.bin")
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepared(files, tmp_path / "cache")
    with pytest.raises(ValueError, match="is damaged, or not the file of its sidecar"):
        prepared(files, tmp_path / "cache", again=True)


def test_nothing_is_copied(tmp_path, shards):
    cache = tmp_path / "cache"
    data = prepared(shards(20, tokens=2000), cache)
    assert len(data.train) > 30_000
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 20_000
    assert {part.path.parent for part in data.train.parts} == {tmp_path / "shards-20-10"}


# Runs


def as_shards(folder: Path, text: str, tokenizer, count: int = 3) -> str:
    """Shards with one document a line of `text`."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        parts = [np.append(tokenizer.encode(line), EOS_ID) for line in text.splitlines()[number::count]]
        path = folder / f"{number}.bin"
        write_shard(
            path,
            np.concatenate(parts),
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            bytes=sum(len(line.encode()) for line in text.splitlines()[number::count]),
        )
    return f"{folder}/*.bin"


def test_the_folder_of_prepare_trains_as_its_text_does(train, tmp_path, text_file):
    """The same tokens in the same order under the same fingerprint: the same run, but for its config."""
    steps = ("trainer.max_steps=8", "tokenizer=char")
    assert train(tmp_path / "text", *steps) == 0
    cfg = compose(*SMALL, f"data.files={text_file}", "tokenizer=char")
    from gptlab import assembly

    folder = assembly.build_data(cfg).prepared.folder
    named = ("data.files=null", f"data.tokens={folder}", f"tokenizer.path={folder}")
    assert train(tmp_path / "ids", *steps, *named) == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("text", "ids")]
    for key in ("train_loss", "val_loss", "val_bits_per_byte"):
        assert results[0][key] == results[1][key], key
    assert results[0]["fingerprints"]["data"] == results[1]["fingerprints"]["data"]


def test_windows_and_figures_are_those_of_the_same_ids_prepared(tmp_path):
    text = prose(900)
    (tmp_path / "text.txt").write_text(text)
    tokenizer = ByteTokenizer()
    of_text = prepare(ids_source(tmp_path / "text.txt"), tokenizer, validation_fraction=0.1, cache=tmp_path / "cache")
    np.save(tmp_path / "train.npy", of_text.train[:])
    np.save(tmp_path / "held-out.npy", of_text.validation[:].astype(">i4"))
    of_ids = prepare_ids(
        str(tmp_path / "train.npy"),
        tokenizer,
        validation_files=str(tmp_path / "held-out.npy"),
        validation_fraction=0.1,
        cache=tmp_path / "cache",
    )
    for side in ("train", "validation"):
        for figure in ("tokens", "documents", "bytes", "unknown_tokens"):
            assert of_text.meta["splits"][side][figure] == of_ids.meta["splits"][side][figure], (side, figure)
        cut = partial(WindowDataset, block_size=T, stride=T // 2)
        one, other = (windows_in(getattr(data, side), cut) for data in (of_text, of_ids))
        for number in (0, len(one) - 1):
            assert one[number]["targets"].tolist() == other[number]["targets"].tolist()


def ids_source(path: Path):
    from gptlab.data.corpus import Files

    return Files(str(path))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_equals_uninterrupted(train, tmp_path, workers):
    files = as_shards(tmp_path / "shards", prose(3000), ByteTokenizer())
    own = ("data.files=null", f"data.tokens={files}", f"data.num_workers={workers}", "schedule=constant")
    watched = ("samples.every_steps=3", "samples.max_tokens=5", "validation.every_steps=3")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(whole, *own, *watched, "trainer.max_steps=9") == 0
    assert train(part, *own, *watched, "trainer.max_steps=6") == 0
    assert train(part, f"resume={part}", "trainer.max_steps=9") == 0
    assert differences(whole, part) == []


def test_a_run_goes_on_where_its_shards_stand_now_and_says_which_are_others(train, tmp_path, capsys):
    files = as_shards(tmp_path / "shards", prose(3000), ByteTokenizer())
    run = tmp_path / "run"
    assert train(run, "data.files=null", f"data.tokens={files}", "trainer.max_steps=2") == 0
    path = tmp_path / "shards/1.bin"
    own = np.fromfile(path, "<u2")
    write_shard(path, np.roll(own, 1))
    capsys.readouterr()
    assert train(run, f"resume={run}", "trainer.max_steps=4") == 2
    said = capsys.readouterr().err
    assert "the run was trained on data with fingerprint" in said
    assert f"changed: {path}" in said
    write_shard(path, own)
    assert train(run, f"resume={run}", "trainer.max_steps=4") == 0


def test_from_the_command_line_in_any_folder_with_the_tokenizer_of_a_run(train, tmp_path):
    first = tmp_path / "first"
    assert train(first, "tokenizer=char", "trainer.max_steps=1") == 0
    from gptlab.tokenizer import load_tokenizer

    (tmp_path / "here/deep").mkdir(parents=True)
    as_shards(tmp_path / "here/shards", prose(2000), load_tokenizer(first))
    words = [word for word in SMALL if not word.startswith("tokenizer")]
    steps = "trainer.max_steps=2"
    own = ("data.tokens=../shards/*.bin", "tokenizer.path=../../first", "run_dir=run")
    done = door("train", *words, steps, *own, cwd=tmp_path / "here/deep")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "here/deep/run"
    more = door("train", f"resume={run}", "trainer.max_steps=3", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 3
    named = door(
        "train", *words, steps, f"data.tokens={tmp_path}/here/shards/*.bin", f"init_from={first}", cwd=tmp_path
    )
    assert named.returncode == 0, named.stderr  # which brings its tokenizer
    table = door("prepare", f"data.tokens={tmp_path}/here/shards/0.bin", f"tokenizer.path={first}", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert "the tail of each file" in re.sub(r"\s+", " ", table.stdout)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data.tokens={}/0.bin",), ("data.tokens=", "goes with tokenizer.path")),
        (("data.tokens={}/0.bin", "tokenizer=char"), ("goes with tokenizer.path",)),
        (("data.tokens={}/0.bin", "tokenizer=byte", "data.files=a.txt"), ("data.files=", "data.tokens=", "leave one")),
        (("data.tokens={}/0.bin", "tokenizer=byte", "data.normalize=NFC"), ("data.normalize=NFC", "data.tokens=")),
        (("data.tokens={}/0.bin", "tokenizer=byte", "data.deduplicate=exact"), ("data.deduplicate=exact",)),
        (("data.tokens={}/0.bin", "tokenizer=byte", "data.documents=line"), ("data.documents=line",)),
        (("data.tokens={}/0.bin", "tokenizer=byte", "data.validation_files=a"), ("data.validation_files=",)),
        (
            ("data.validation_tokens={}/0.bin",),
            ("data.validation_tokens=", "goes with data.tokens"),
        ),
        (("data.tokens=3", "tokenizer=byte"), ("data.tokens=3", "is no path")),
        (("data.tokens={}/9.bin", "tokenizer=byte"), ("data.tokens='{}/9.bin'", "no such file")),
        (("data.tokens=[{0}/0.bin,{0}/0.bin]", "tokenizer=byte"), ("0.bin is named twice",)),
        (
            ("data.tokens={}/0.bin", "tokenizer=byte", "data.validation_tokens={}/0.bin"),
            ("0.bin is held out, and the same as",),
        ),
    ],
)
def test_what_does_not_go_together_is_one_message(tmp_path, overrides, says, monkeypatch, capsys):
    import gptlab.train

    as_shards(tmp_path / "shards", prose(300), ByteTokenizer())
    given = [override.format(tmp_path / "shards") for override in overrides]
    words = [word for word in SMALL if not word.startswith("tokenizer")]
    monkeypatch.setattr("sys.argv", ["train.py", *words, *given, "trainer.max_steps=1"])
    with pytest.raises(SystemExit) as exit_:
        gptlab.train.main()
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.startswith("error: ")
    for said in says:
        assert said.format(tmp_path / "shards") in message
    assert not list((tmp_path / "runs").glob("*/*"))


def test_the_folder_of_prepare_has_its_own_held_out_ids_and_tokenizer(tmp_path, text_file):
    data = TextDataModule(DataConfig(files=str(text_file)), None, ByteTokenizer(), block_size=16, seed=1)
    data.prepare_data()
    folder = str(data.prepared.folder)
    with pytest.raises(ValueError, match=r"a folder with its own held-out ids, and data.validation_tokens='x'"):
        prepare_ids(folder, ByteTokenizer(), validation_files="x", validation_fraction=0.1, cache=tmp_path)
    with pytest.raises(ValueError, match="was made with the tokenizer"):
        prepare_ids(folder, CharTokenizer("abc"), validation_fraction=0.1, cache=tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"give tokenizer.path={folder}")):
        ids.ready(CharTokenizer.train, folder)
    assert count_ids(folder) == len(data.prepared.train) + len(data.prepared.validation)


def test_the_dial_knows_how_many_ids_there_are(tmp_path):
    files = as_shards(tmp_path / "shards", prose(3000), ByteTokenizer())
    few = compose("depth=2", f"data.tokens={files}", "tokenizer=byte")
    assert few["trainer"]["max_steps"] < compose("depth=2", "data.text_bytes=null")["trainer"]["max_steps"]
    tokens = count_ids(files) * 0.9
    steps, batch = few["trainer"]["max_steps"], few["data"]["batch_size"] * few["trainer"]["accumulate_grad_batches"]
    assert steps * batch * few["model"]["block_size"] == pytest.approx(4 * tokens, rel=0.05)


def test_the_same_ids_in_another_kind_of_file_are_copies(tmp_path):
    ids = np.random.default_rng(0).integers(13, 200, 500)
    np.save(tmp_path / "a.npy", ids.astype("<u2"))
    np.save(tmp_path / "b.npy", ids.astype("<i8"))
    with pytest.raises(ValueError, match=r"b.npy is held out, and the same as .*a.npy, which is trained on"):
        prepare_ids(
            str(tmp_path / "a.npy"),
            ByteTokenizer(),
            validation_files=str(tmp_path / "b.npy"),
            validation_fraction=0.1,
            cache=tmp_path / "cache",
        )


MANY = """
import resource, sys
from pathlib import Path
from gptlab.data.tokens import TokenFile
resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[2])))
files = [TokenFile(path, "<u2", 8) for path in Path(sys.argv[1]).glob("*.bin")]
print(sum(int(file[:][0]) for file in files))
"""


@pytest.mark.parametrize(("most", "said"), [(400, "700"), (60, "ulimit -n")])
def test_more_files_than_may_be_open(tmp_path, most, said):
    """The limit is raised as far as the system allows; what is beyond is said with the remedy."""
    for number in range(100):
        np.full(8, 7, "<u2").tofile(tmp_path / f"{number}.bin")
    command = [sys.executable, "-c", MANY, tmp_path, str(most)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert said in done.stdout + done.stderr

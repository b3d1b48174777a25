"""`validate_data` finds what is wrong in data that is really broken so, and nothing in data that is not."""

import gzip
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, compose, door, prose
from test_ids import as_shards
from test_shards import write_shard

from gptlab import assembly, soundness
from gptlab.data.module import DataConfig, TextDataModule
from gptlab.soundness import Soundness
from gptlab.tokenizer import EOS_ID, N_SPECIAL, ByteTokenizer, SentencePieceTokenizer

FIELDS = {
    *("sound", "findings", "documents", "bytes", "tokens", "coverage", "round_trip", "unknown_tokens"),
    *("overlap_32gram", "windows"),
}
SMALL = ("model.block_size=16", "data.batch_size=4")


@pytest.fixture
def judge(monkeypatch, capsys):
    """`judge(*overrides)` gives the exit code, and the JSON object that was all of standard output."""
    import gptlab.validate_data

    def run(*overrides: str) -> tuple[int, dict]:
        monkeypatch.setattr("sys.argv", ["validate_data.py", *SMALL, "json=true", *overrides])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            gptlab.validate_data.main()
        said = capsys.readouterr()
        assert said.out.count("\n") == 1, said.out + said.err
        return exit_.value.code, json.loads(said.out)

    return run


@pytest.fixture
def sound(tmp_path) -> Path:
    """A corpus in which nothing is wrong: documents of words that no other has."""
    folder = tmp_path / "sound"
    folder.mkdir()
    for number in range(12):
        words = [f"{chr(97 + number)}{i * 7919 % 9973:x}" for i in range(300)]
        (folder / f"{number:02}.txt").write_text(" ".join(words) + "\n")
    return folder


def kinds(report: dict) -> list[str]:
    return [finding["kind"] for finding in report["findings"]]


@pytest.mark.parametrize(
    "own", [("tokenizer=byte",), ("tokenizer.vocab_size=400",), ("tokenizer=byte", "data.deduplicate=exact")]
)
def test_a_sound_corpus_is_sound(judge, sound, own):
    code, report = judge(f"data.files={sound}/*.txt", *own)
    assert (code, report["sound"], report["findings"]) == (0, True, [])
    assert report.keys() >= FIELDS
    text = "".join(path.read_text() for path in sorted(sound.iterdir()))
    assert (report["documents"], report["bytes"]) == (12, len(text))
    assert (report["coverage"], report["round_trip"], report["unknown_tokens"]) == (1, 1, 0)
    assert report["overlap_32gram"] == 0
    assert report["lengths"]["longest"] == max(len(path.read_text()) for path in sound.iterdir())
    data = TextDataModule(DataConfig(files=f"{sound}/*.txt"), None, ByteTokenizer(), block_size=16, seed=1)
    data.setup()
    if own == ("tokenizer=byte",):
        assert report["windows"] == {"train": len(data.train_windows), "validation": len(data.validation_windows)}
        assert report["tokens"] == len(data.prepared.train) + len(data.prepared.validation)


@pytest.mark.parametrize(
    "own",
    [pytest.param(("data=pydocs",), marks=pytest.mark.slow), ("data=code", f"data.source.folders={REPOSITORY}/gptlab")],
)
def test_the_corpora_at_hand_are_sound(judge, own):
    code, report = judge(*own, "model.block_size=64")
    assert (code, report["findings"]) == (0, [])


def test_what_chance_repeats_in_text_that_is_drawn_is_no_finding(judge):
    code, report = judge("data=stories", "data.source.documents=300", "tokenizer=byte")
    assert (code, report["findings"]) == (0, [])
    assert report["overlap_32gram"] > soundness.OVERLAP_OF_SHORT


def test_several_sources_are_judged_together(judge, sound):
    """One holds out what the other trains on, in another file."""
    (sound / "copy.txt").write_text("copied:\n" + "".join((sound / f"{n:02}.txt").read_text() for n in range(10)))
    parts = f"{{one: {{files: '{sound}/0*.txt', weight: 1}}, other: {{files: '{sound}/copy.txt', weight: 1}}}}"
    code, report = judge(f"data.mix={parts}", "tokenizer=byte")
    assert (code, kinds(report)) == (1, ["overlap"])
    assert report["documents"] == 11
    data = assembly.build_data(compose(*SMALL, f"data.mix={parts}", "tokenizer=byte"))
    assert report["windows"] == {"train": len(data.train_windows), "validation": len(data.validation_windows)}


# Text that cannot be read


@pytest.mark.parametrize(
    ("content", "says", "line", "byte"),
    [
        ("one\ntwo\nGröße\n".encode("latin1"), "is not UTF-8: byte 10 (0xf6, line 3)", 3, 10),
        (b"one\ntwo\0three", "is binary: byte 7 is NUL, in line 2", 2, 7),
    ],
)
def test_files_that_are_no_text_are_all_named(judge, sound, content, says, line, byte):
    for name in ("03.txt", "07.txt"):
        (sound / name).write_bytes(content)
    code, report = judge(f"data.files={sound}/*.txt", "tokenizer=byte")
    assert (code, kinds(report)) == (2, ["unreadable"] * 2)
    for finding, name in zip(report["findings"], ("03.txt", "07.txt"), strict=True):
        assert f"{sound / name} {says}" in finding["message"]
        assert (finding["file"], finding["line"], finding["byte"]) == (str(sound / name), line, byte)
    assert report.keys() >= FIELDS
    assert {report[name] for name in FIELDS - {"sound", "findings", "windows"}} == {None}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": 3}\n', "line 2: 'text' is 3 there, and must be text"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is no JSON"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt.gz", gzip.compress(b"text " * 999)[:-12], "is damaged"),
    ],
)
def test_files_that_are_not_what_they_say(judge, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    code, report = judge(f"data.files={tmp_path / name}", "tokenizer=byte")
    assert (code, kinds(report)) == (2, ["unreadable"])
    assert says in report["findings"][0]["message"]


# Text in which something is wrong


def test_copies(judge, sound):
    (sound / "99.txt").write_text((sound / "04.txt").read_text().replace(" ", "\n"))
    code, report = judge(f"data.files={sound}/*.txt", "tokenizer=byte")
    assert (code, kinds(report)) == (1, ["duplicates"])
    assert report["duplicates"] == {"documents": 1, "examples": [["04.txt", "99.txt"]]}
    assert "1 of 13 documents are copies of others (99.txt is 04.txt)" in report["findings"][0]["message"]
    code, report = judge(f"data.files={sound}/*.txt", "tokenizer=byte", "data.deduplicate=exact")
    assert (code, report["documents"]) == (0, 12)


def test_a_document_that_should_be_many(judge, sound, monkeypatch):
    monkeypatch.setattr(soundness, "LONG", {"characters": 1000, "tokens": 1000})
    code, report = judge(f"data.files={sound}/*.txt", "tokenizer=byte")
    assert (code, kinds(report)) == (1, ["long"])
    assert "is one document of 1," in report["findings"][0]["message"]


def test_control_characters(judge, sound):
    (sound / "05.txt").write_text("one\ntwo \x1b[1m three\x1b[0m " + (sound / "05.txt").read_text())
    rows = [json.dumps({"text": f"row {number} " * 9 + "\x7f" * (number == 3)}) for number in range(40)]
    (sound / "rows.jsonl").write_text("\n".join(rows))
    code, report = judge(f"data.files=[{sound}/*.txt,{sound}/rows.jsonl]", "tokenizer=byte")
    assert (code, kinds(report)) == (1, ["control_characters"])
    found = [(one["character"], one["times"], one["first"]) for one in report["control_characters"]]
    assert found == [("U+001B", 2, "05.txt, line 2"), ("U+007F", 1, "rows.jsonl:4, line 1")]
    assert "U+001B (escape) 2 times, first in 05.txt, line 2" in report["findings"][0]["message"]


def test_a_vocabulary_without_the_characters_of_the_text(judge, sound, tmp_path):
    for path in sound.iterdir():
        path.write_text("".join(chr(0x400 + int(word[-1], 16)) for word in path.read_text().split()))
    (tmp_path / "other.txt").write_text(prose(2000))
    own = (f"tokenizer.files={tmp_path}/other.txt", "tokenizer.vocab_size=330")
    code, report = judge(f"data.files={sound}/*.txt", *own)
    assert code == 1
    assert "coverage" in kinds(report)
    assert report["coverage"] < 0.1
    assert report["round_trip"] == 1


def test_a_tokenizer_that_does_not_know_the_text(judge, sound, tmp_path):
    (tmp_path / "other.txt").write_text(prose(2000))
    code, report = judge(f"data.files={sound}/*.txt", "tokenizer=char", f"tokenizer.files={tmp_path}/other.txt")
    assert (code, kinds(report)) == (1, ["coverage", "unknown_tokens"])
    data = assembly.build_data(
        compose(*SMALL, f"data.files={sound}/*.txt", "tokenizer=char", f"tokenizer.files={tmp_path}/other.txt")
    )
    sides = (data.prepared.train[:], data.prepared.validation[:])
    assert report["unknown_tokens"] == sum((side == 0).sum() for side in sides) > 0
    assert report["round_trip"] < 1


class Forgetful(ByteTokenizer):
    """Says that it loses nothing, and loses capitals."""

    def decode_bytes(self, ids) -> bytes:
        return super().decode_bytes(ids).lower()


def test_a_tokenizer_that_does_not_keep_its_promise(tmp_path):
    (tmp_path / "text.txt").write_text(prose(4000))
    data = TextDataModule(DataConfig(files=str(tmp_path / "text.txt")), None, Forgetful(), block_size=16, seed=1)
    found = Soundness(data, accumulate=1)
    assert kinds(found.report) == ["round_trip"]
    assert found.report["round_trip"] == 0
    assert found.exit_code == 1


def test_too_little_text_for_windows_and_for_a_step(judge, sound):
    code, report = judge(f"data.files={sound}/*.txt", "tokenizer=byte", "model.block_size=100000")
    assert (code, kinds(report)) == (1, ["windows"])
    assert report["windows"] == {"train": 0, "validation": 1}
    assert "lower model.block_size" in report["findings"][0]["message"]
    code, report = judge(f"data.files={sound}/*.txt", "tokenizer=byte", "data.batch_size=100000")
    assert (code, kinds(report)) == (1, ["windows"])
    assert "an optimizer step takes 100000 windows" in report["findings"][0]["message"]


def test_text_of_which_no_tokens_can_be_made(judge, sound):
    code, report = judge(f"data.files={sound}/*.txt", "tokenizer.vocab_size=30000")
    assert (code, kinds(report)) == (1, ["prepare"])
    assert "tokenizer.vocab_size=30000" in report["findings"][0]["message"]
    assert report["documents"] == 12
    assert report["tokens"] is None


def test_held_out_text_that_is_trained_on(judge, sound, tmp_path):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("".join((sound / f"{number:02}.txt").read_text()[:900] for number in range(12)) + prose(300))
    code, report = judge(f"data.files={sound}/*.txt", f"data.validation_files={held_out}", "tokenizer=byte")
    assert (code, kinds(report)) == (1, ["overlap"])
    assert report["documents"] == 13
    assert report["overlap_32gram"] == pytest.approx(10_800 / len(held_out.read_text()), abs=0.05)
    assert "val/loss will be too low" in report["findings"][0]["message"]
    data = assembly.build_data(
        compose(*SMALL, f"data.files={sound}/*.txt", f"data.validation_files={held_out}", "tokenizer=byte")
    )
    from test_survey import naive

    assert report["overlap_32gram"] == naive([data.prepared.train[:]], [data.prepared.validation[:]])


# Token files


def test_sound_shards_are_sound(judge, tmp_path):
    text = "\n".join(f"{i * 7919 % 99991:05} {i * 104729 % 99991:x} {i}" for i in range(1200))
    files = as_shards(tmp_path / "shards", text, ByteTokenizer())
    code, report = judge(f"data.tokens={files}", "tokenizer=byte")
    assert (code, report["findings"]) == (0, [])
    assert (report["documents"], report["bytes"]) == (1200, len(text) - 1199)
    assert report["tokens"] == len(text) + 1
    assert (report["round_trip"], report["unknown_tokens"], report["coverage"]) == (1, 0, None)
    assert report["overlap_32gram"] < 0.01
    assert report["round_trip_of"]["documents"] > 100


def test_all_that_is_wrong_with_shards_is_named(judge, tmp_path):
    good = ByteTokenizer().encode(prose(500))
    paths = [tmp_path / f"{number}.bin" for number in range(5)]
    write_shard(paths[0], good)
    write_shard(paths[1], np.where(np.arange(len(good)) == 70, 300, good))
    write_shard(paths[2], good, sha256="0" * 64)
    write_shard(paths[3], good, tokenizer_fingerprint="0" * 64)
    write_shard(paths[4], good, documents=9)
    code, report = judge(f"data.tokens={tmp_path}/*.bin", "tokenizer=byte")
    assert (code, kinds(report)) == (1, ["tokens"] * 4)
    said = [finding["message"] for finding in report["findings"]]
    for message, path, word in zip(
        said, paths[1:], ("place 70 (byte 140) is 300", "its sha256 is", "was made with", "end a document"), strict=True
    ):
        assert str(path) in message
        assert word in message
    assert report["windows"] == {"train": None, "validation": None}


def test_damage_that_a_run_would_not_see_is_found(judge, tmp_path, train):
    """A run takes a file that has its old size and time for what it was; validate_data reads it."""
    import os

    files = as_shards(tmp_path / "shards", prose(3000), ByteTokenizer())
    own = ("data.files=null", f"data.tokens={files}", "trainer.max_steps=1")
    assert train(tmp_path / "one", *own) == 0
    path = tmp_path / "shards/1.bin"
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert train(tmp_path / "two", *own) == 0
    code, report = judge(f"data.tokens={files}", "tokenizer=byte")
    assert (code, kinds(report)) == (1, ["tokens"])
    assert "is damaged, or not the file of its sidecar" in report["findings"][0]["message"]


def test_empty_documents_and_copies_in_shards(judge, tmp_path):
    tokenizer = ByteTokenizer()
    lines = [f"{i * 7919 % 99991:05} {i * 104729 % 99991:x} {i}" for i in range(300)] + ["twice the same text"] * 9
    ids = np.concatenate([np.append(tokenizer.encode(line), EOS_ID) for line in lines] + [[EOS_ID] * 3])
    write_shard(tmp_path / "a.bin", ids)
    code, report = judge(f"data.tokens={tmp_path}/a.bin", "tokenizer=byte")
    assert code == 1
    assert kinds(report)[:2] == ["duplicates", "empty"]
    assert report["duplicates"]["documents"] == 8 + 2
    assert report["empty_documents"] == 3


def test_ids_of_another_tokenizer_that_nothing_else_gives_away(judge, tmp_path):
    text = prose(4000)
    one = SentencePieceTokenizer.train(
        iter([text]), vocab_size=320, model_type="bpe", character_coverage=1.0, max_train_bytes=10**6
    )
    ids = np.concatenate([np.append(one.encode(line), EOS_ID) for line in text.splitlines()])
    np.save(tmp_path / "ids.npy", ids)
    one.save(tmp_path / "one")
    _, report = judge(f"data.tokens={tmp_path}/ids.npy", f"tokenizer.path={tmp_path}/one")
    assert report["round_trip"] == 1
    assert "round_trip" not in kinds(report)
    np.save(tmp_path / "ids.npy", np.where(ids >= N_SPECIAL, N_SPECIAL + ids * 7 % 300, ids))
    _, report = judge(f"data.tokens={tmp_path}/ids.npy", f"tokenizer.path={tmp_path}/one")
    assert report["round_trip"] < 0.2
    assert "round_trip" in kinds(report)


@pytest.mark.parametrize("what", ["missing", "sidecar", "truncated"])
def test_token_files_that_cannot_be_read(judge, tmp_path, what):
    path = write_shard(tmp_path / "a.bin", ByteTokenizer().encode(prose(500)))
    if what == "missing":
        path.unlink()
    elif what == "sidecar":
        Path(f"{path}.json").unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    code, report = judge(f"data.tokens={path}", "tokenizer=byte")
    assert (code, kinds(report)) == (2, ["unreadable"])
    assert str(path) in report["findings"][0]["message"]


def test_the_folder_of_prepare(judge, sound):
    data = assembly.build_data(compose(*SMALL, f"data.files={sound}/*.txt", "tokenizer=byte"))
    folder = data.prepared.folder
    own = (f"data.tokens={folder}", f"tokenizer.path={folder}")
    code, report = judge(*own)
    assert (code, report["findings"]) == (0, [])
    assert report["tokens"] == len(data.prepared.train) + len(data.prepared.validation)
    content = bytearray((folder / "train.bin").read_bytes())
    content[10] ^= 1
    (folder / "train.bin").write_bytes(content)
    code, report = judge(*own)
    assert (code, kinds(report)) == (1, ["tokens"])
    assert "the bytes of train.bin are not those that were written" in report["findings"][0]["message"]


# As a command


def test_exit_codes_and_output_as_commands(tmp_path, sound):
    """From a folder of its own, by a path that is relative to it; figures as a table, and remedies."""
    (sound / "deep").mkdir()
    files = "data.files=../*.txt"
    done = door("validate_data", *SMALL, files, "tokenizer=byte", cwd=sound / "deep")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "sound"), done.stderr
    assert "overlap 32gram" in done.stdout
    (sound / "99.txt").write_text((sound / "04.txt").read_text())
    done = door("validate_data", *SMALL, files, "tokenizer=byte", cwd=sound / "deep")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "1 finding"), done.stderr
    assert "duplicates: 1 of 13 documents" in done.stdout
    assert "data.deduplicate=exact" in done.stdout
    (sound / "98.txt").write_bytes(b"\xff" * 9)
    done = door("validate_data", *SMALL, files, "tokenizer=byte", cwd=sound / "deep")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sound}/98.txt is not UTF-8")
    assert len(done.stderr.splitlines()) <= 15
    done = door("validate_data", *SMALL, files, "tokenizer=byte", "json=true", cwd=sound / "deep")
    assert done.returncode == 2
    assert json.loads(done.stdout)["sound"] is False


@pytest.mark.parametrize("word", ["validate_data", "validate-data"])
def test_the_word_of_the_console_script(word, sound):
    command = [sys.executable, "-m", "gptlab", word, *SMALL, f"data.files={sound}/*.txt", "tokenizer=byte"]
    done = subprocess.run([*command, "json=true"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sound"] is True


def test_the_log_goes_to_standard_error_beside_json_and_comes_back(judge, sound, capsys):
    import logging

    before = logging.getLogger("gptlab").handlers
    code, _ = judge(f"data.files={sound}/*.txt", "tokenizer=char", "data.min_characters=7")  # prepared here: it logs
    assert code in (0, 1)
    assert logging.getLogger("gptlab").handlers == before
    logging.getLogger("gptlab").info("a word")
    assert capsys.readouterr() == ("a word\n", "")


def test_what_no_config_can_be_is_one_message(monkeypatch, capsys):
    import gptlab.validate_data

    for override, says in (("jsn=true", "did you mean 'json'"), ("data.tokens=a.npy", "goes with tokenizer.path")):
        monkeypatch.setattr("sys.argv", ["validate_data.py", override])
        with pytest.raises(SystemExit) as exit_:
            gptlab.validate_data.main()
        said = capsys.readouterr()
        assert (exit_.value.code, said.out) == (2, "")
        assert says in said.err


def test_it_takes_every_key_that_train_has():
    own = compose(config_name="validate_data")
    assert own.pop("json") is False
    assert own == compose()


def test_a_stream_is_refused():
    done = door("validate_data", "data=stream", "data.files=a.txt", "data.validation_files=b.txt")
    assert done.returncode == 2
    assert "without data=stream" in done.stderr


@pytest.mark.slow
def test_copies_of_generated_text_in_a_mixture_are_chance(judge):
    mix = "{stories: {source: {_target_: gptlab.data.stories.Stories, documents: 3000, seed: 1}}, pydocs: 1}"
    code, report = judge(f"data.mix={mix}", "tokenizer=byte")
    assert (code, kinds(report)) == (0, [])
    assert report["overlap_32gram"] > soundness.OVERLAP_OF_SHORT


def test_it_judges_the_tokenizer_of_the_parent(judge, train, tmp_path, sound, monkeypatch, capsys):
    """As `prepare` does: what a run with these keys would train on."""
    import gptlab.prepare

    assert train(tmp_path / "parent", "trainer.max_steps=1", "data.validation_fraction=0.3") == 0
    own = ("tokenizer.vocab_size=400", f"data.files={sound}/*.txt")
    report = judge(f"data.files={sound}/*.txt", f"init_from={tmp_path}/parent")[1]
    assert judge(*own)[1]["tokens"] != report["tokens"]
    assert report["tokens"] == report["bytes"] + 2 * report["documents"]  # bytes, and ends on both sides
    monkeypatch.setattr("sys.argv", ["prepare.py", f"data.files={sound}/*.txt", f"init_from={tmp_path}/parent"])
    with pytest.raises(SystemExit) as exit_:
        gptlab.prepare.main()
    assert exit_.value.code == 0
    assert "269 tokens known" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["prepare.py", f"data.files={sound}/*.txt", f"resume={tmp_path}/parent"])
    with pytest.raises(SystemExit) as exit_:
        gptlab.prepare.main()
    assert exit_.value.code == 2
    assert "goes on with what that run has: leave it out here" in capsys.readouterr().err


def test_text_that_a_tokenizer_learns_from_is_brought_to_the_same_normal_form(judge, tmp_path):
    files = (f"data.files={tmp_path}/nfd.txt", f"tokenizer.files={tmp_path}/nfd.txt", "data.normalize=NFC")
    (tmp_path / "nfd.txt").write_text(unicodedata.normalize("NFD", "año café niño\n") * 300)
    _, report = judge(*files, "tokenizer=char")
    assert (report["unknown_tokens"], report["coverage"], report["round_trip"]) == (0, 1, 1)

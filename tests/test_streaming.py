"""Runs on streamed text: resumed, killed, on two ranks; and what they say of text that nobody counted."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, SMALL, compose, door, prose
from test_ranks import KINDS, RUN, assert_close, lay_out
from test_resume import assert_same_run, interrupted_at
from trials import Trial, differences

from gptlab.assembly import build_data
from gptlab.data.module import DataConfig
from gptlab.data.streaming import StreamDataModule, TextStream
from gptlab.tokenizer import ByteTokenizer, SentencePieceTokenizer

STEPS = 9  # an epoch has four
STREAM = (
    *("data=stream", "data.stream.buffer=13", "data.stream.epoch_windows=64", f"trainer.max_steps={STEPS}"),
    *("data.batch_size=8", "trainer.accumulate_grad_batches=2", "model.dropout=0.3", "checkpoint.every_steps=1"),
    *("checkpoint.keep_last=100", "validation.every_steps=4", "samples.every_steps=3", "samples.max_tokens=5"),
)


def write_shards(folder: Path, shards: int = 5) -> tuple[str, ...]:
    """Files to train on and to validate on, and the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        rows = [{"text": prose(8 + row, 100 * shard + row)} for row in range(6)]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held-out.txt").write_text(prose(200, 999))
    return f"data.files={folder}/*.jsonl", f"data.validation_files={folder}/held-out.txt"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    return write_shards(tmp_path / "shards")


def test_resumed_from_every_step_is_the_run_that_was_not(train, tmp_path, files):
    """Across blocks, shards, turns through the text and epochs, with a reader for every other window."""
    whole = tmp_path / "whole"
    assert train(whole, *STREAM, *files, "data.stream.readers=2") == 0
    for step in range(1, STEPS):
        part = interrupted_at(whole, step, tmp_path / f"part-{step}")
        assert train(part, f"resume={part}", "seed=77") == 0
        assert_same_run(whole, part)


class Killed(Trial):
    """Sessions on a stream, each killed once it has done so many steps."""

    def until(self, step: int) -> Iterator[int]:
        pid = self.begin()
        seen = 0
        while seen <= step:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), self.log.read_text()
            seen = len(self.witness.read_text().splitlines()) if self.witness.exists() else 0
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        yield seen


@pytest.mark.slow
@pytest.mark.parametrize("readers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, files, readers):
    options = ("data=stream", *files, "data.stream.buffer=13", f"data.stream.readers={readers}")
    text = tmp_path / "shards/*.jsonl"
    whole = Trial(tmp_path / "whole/run", text, options)
    pid = whole.begin()
    assert os.waitpid(pid, 0)[1] == 0, whole.log.read_text()
    trial = Killed(tmp_path / "killed/run", text, options)
    for step in (10, 24, 40):
        next(trial.until(step))
    pid = trial.begin()
    assert os.waitpid(pid, 0)[1] == 0, trial.log.read_text()
    assert differences(whole.folder, trial.folder) == []


def test_what_a_run_says_of_text_that_nobody_counted(train, tmp_path, files, capsys):
    run = tmp_path / "run"
    assert train(run, *STREAM, *files, "trainer.max_steps=4") == 0
    said = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.jsonl"))
    assert f"training text of 5 files, {size / 1e3:.1f} kB as they lie, read while training; 9" in said
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["train_tokens"], result["epochs"]) == (4, 4 * 16 * 16, 1.0)
    assert result["val_loss"] is not None
    assert len(result["fingerprints"]["data"]) == 64


def test_no_token_of_the_training_text_is_written(train, tmp_path, files, monkeypatch):
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(tmp_path / "own-cache"))
    assert train(tmp_path / "run", *STREAM, *files, "trainer.max_steps=1") == 0
    assert [path.stat().st_size for path in (tmp_path / "own-cache").rglob("train.bin")] == [0]


@pytest.mark.slow
def test_compiled_and_with_a_tokenizer_of_its_own(train, tmp_path, files):
    options = ("tokenizer=sentencepiece", "tokenizer.vocab_size=320", "compile=true", "trainer.max_steps=2")
    assert train(tmp_path / "run", *STREAM, *files, *options, "data.stream.sample_bytes=1000") == 0


@pytest.mark.slow
def test_two_ranks_make_the_run_of_one(tmp_path):
    """With a reader each, and going on in one process from what they saved."""
    folder = lay_out(tmp_path / "ranks")
    own = ("data=stream", *write_shards(folder / "shards"), "data.stream.readers=2", "data.stream.buffer=13")
    ends = ("data.stream.epoch_windows=40", "task=lm")
    for name, where in (("one", ("trainer=cpu", "data.batch_size=8")), ("ddp", KINDS["ddp"])):
        done = door("train", *RUN, *own, *ends, *where, f"run_dir={folder / name}", cwd=folder)
        assert done.returncode == 0, done.stderr
    assert_close(folder / "one", folder / "ddp")
    part = interrupted_at(folder / "ddp", 7, tmp_path / "part")
    done = door("train", f"resume={part}", "trainer=cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_close(folder / "one", part)


@pytest.mark.parametrize("change", ["content", "another", "date", "gone"])
def test_other_files_are_refused_and_named(train, tmp_path, files, capsys, change):
    whole = tmp_path / "whole"
    assert train(whole, *STREAM, *files) == 0
    part = interrupted_at(whole, 4, tmp_path / "part")
    shard = tmp_path / "shards/3.jsonl"
    if change == "content":
        shard.write_text(shard.read_text() + '{"text": "more"}\n')
    elif change == "another":
        shutil.copy(shard, tmp_path / "shards/7.jsonl")
    elif change == "date":
        os.utime(shard, (1, 1))
    else:
        shard.unlink()
    assert train(part, f"resume={part}") == 2
    said = capsys.readouterr().err
    word = {"content": "changed: 3.jsonl", "date": "changed: 3.jsonl", "another": "new: 7.jsonl", "gone": "missing: 3"}
    assert "fingerprint" in said
    assert word[change] in said
    assert "init_from" in said


def test_files_that_have_moved_with_their_dates_are_the_same(train, tmp_path, files):
    whole = tmp_path / "whole"
    assert train(whole, *STREAM, *files) == 0
    part = interrupted_at(whole, 4, tmp_path / "part")
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    config = yaml.safe_load((part / "config.yaml").read_text())
    config["data"]["files"] = f"{tmp_path}/elsewhere/*.jsonl"
    config["data"]["validation_files"] = f"{tmp_path}/elsewhere/held-out.txt"
    (part / "config.yaml").write_text(yaml.safe_dump(config))
    assert train(part, f"resume={part}") == 0
    assert_same_run(whole, part)


def test_an_epoch_is_validated_once_and_ends_a_run(train, tmp_path, files):
    run = tmp_path / "run"
    epochs = ("trainer.max_steps=-1", "trainer.max_epochs=2", "validation.every_steps=null")
    assert train(run, *STREAM, *files, *epochs) == 0
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["epochs"]) == (8, 2.0)
    assert [entry["step"] for entry in result["history"]] == [4, 8]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("data.validation_files=null",),
            "data=stream needs data.validation_files: a share of a text can only",
        ),
        (("data.files=null",), "data=stream reads data.files, which is null"),
        (("data.stride=4",), "data.stride=4: windows of data=stream stand side by side"),
        (("data.deduplicate=exact",), "data.deduplicate=exact: a stream does not know what it has read before"),
        (("data.num_workers=2",), "data.num_workers=2: data.stream.readers read a stream"),
        (("data.stream.readers=6",), "data.stream.readers=6, and data.files names 5 files"),
        (("data.stream.buffer=0",), "data.stream.buffer=0 must be at least 1"),
        (("data.stream.epoch_windows=15",), "data.stream.epoch_windows=15 is less than the 16 windows"),
        (("+data.stream.bufer=3",), "data.stream.bufer=3: TextStream takes no such key, did you mean 'buffer'"),
        (
            ("data.mix={pydocs: 1}", "data.files=null", "data.validation_files=null"),
            "data.mix is of texts that are prepared before training",
        ),
    ],
)
def test_what_cannot_be_is_said_before_a_step(tmp_path, files, overrides, says):
    done = door("train", *SMALL, *STREAM, *files, *overrides)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) <= 15
    assert not (tmp_path / "runs").exists()


def test_litdata_that_is_not_installed_says_what_to_install(train, tmp_path, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", None)
    own = ("data=litdata", "data.files=null", "data.stream.folder=tokens", files[1])
    with pytest.raises(ValueError, match=r'data=litdata is not installed .* pip install "gptlab\[stream\]"'):
        train(tmp_path / "run", *own)


def test_the_page_s_command_runs(tmp_path):
    page = (REPOSITORY / "docs/streaming.md").read_text()
    (command,) = re.findall(r"^```sh\n(.*?)\n```", page, re.MULTILINE | re.DOTALL)
    write_shards(tmp_path / "texts")
    (tmp_path / "texts/held-out.txt").rename(tmp_path / "held-out.txt")
    few = ("tokenizer=byte", "compile=false", "model.n_layer=1", "model.n_embd=16", "model.n_head=1")
    done = door("train", *shlex.split(command)[3:], *few, "trainer.max_steps=2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("run: ")


@pytest.mark.parametrize("same", ["a shard", "a copy of one"])
def test_validation_text_that_is_trained_on_is_refused(tmp_path, files, same):
    shard = tmp_path / "shards/2.jsonl"
    if same == "a copy of one":
        shard = shutil.copy(shard, tmp_path / "copy.jsonl")
    done = door("train", *SMALL, *STREAM, *files, f"data.validation_files={shard}")
    assert done.returncode == 2
    assert "is validation text, and the same as" in done.stderr


def test_prepare_shows_validation_and_a_sample(tmp_path, files):
    done = door("prepare", *STREAM[:3], *files, "tokenizer.vocab_size=320", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation is data.validation_files" in " ".join(done.stdout.split())
    assert "train" not in done.stdout.splitlines()[1]
    assert "the tokenizer on" in done.stdout


def stream(files: tuple[str, ...], **changes) -> StreamDataModule:
    named = dict(option.removeprefix("data.").split("=") for option in files)
    settings = {"buffer": 10, "readers": 1, "epoch_windows": 100, "sample_bytes": 10**6}
    tokenizer = changes.pop("tokenizer", ByteTokenizer())
    config = DataConfig(**named, **{key: changes.pop(key) for key in ("min_characters",) if key in changes})
    return StreamDataModule(config, TextStream(**(settings | changes)), tokenizer, block_size=16, seed=1)


def test_a_tokenizer_learns_from_a_bounded_sample_of_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("gptlab.data.listed.SAMPLED_FILES", 4)
    files = write_shards(tmp_path / "many", shards=10)
    data = stream(files, sample_bytes=400)
    texts = [document.text for document in data.sample.documents()]
    sizes = [len(text) for text in texts]
    assert 400 <= sum(sizes) < 400 + 4 * max(sizes)
    read = [
        path
        for path in (tmp_path / "many").glob("*.jsonl")
        if any(json.dumps(text) in path.read_text() for text in texts)
    ]
    assert len(read) == 4
    everything = stream(files, sample_bytes=10**9)
    assert sum(1 for _ in everything.sample.documents()) == 24  # of four files


def test_a_sample_is_read_once_and_again_when_the_files_change(tmp_path):
    import functools

    files = write_shards(tmp_path / "few")
    learn = functools.partial(
        SentencePieceTokenizer.train, vocab_size=320, model_type="bpe", character_coverage=1.0, max_train_bytes=10**6
    )
    first, second = stream(files, tokenizer=learn), stream(files, tokenizer=learn)
    first.prepare_data()
    second.sample.read = None  # nobody may
    second.prepare_data()
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.fingerprint == first.fingerprint
    (tmp_path / "few/0.jsonl").write_text(json.dumps({"text": "quite another text here, " * 50}) + "\n")
    third = stream(files, tokenizer=learn)
    third.prepare_data()
    assert third.tokenizer.fingerprint != first.tokenizer.fingerprint


def test_files_read_in_another_way_are_other_data(files):
    one, other = stream(files), stream(files, min_characters=20)
    for data in (one, other):
        data.prepare_data()
    assert one.files == other.files
    assert one.fingerprint != other.fingerprint


def test_held_out_text_by_url_that_is_trained_on_is_refused(files, tmp_path):
    shards = sorted(Path(files[0].removeprefix("data.files=")).parent.glob("*.jsonl"))
    urls = f"data.files=[{','.join(f'file://{shard}' for shard in shards)}]"
    done = door("prepare", *SMALL, *STREAM, urls, f"data.validation_files=file://{shards[0]}")
    assert done.returncode == 2
    assert "is validation text, and the same as" in done.stderr


def test_a_buffer_too_small_for_the_ranks_is_refused(files):
    cfg = compose(*SMALL, *STREAM, *files, "data.stream.buffer=3")
    data = build_data(cfg)
    data.order(world=3)
    with pytest.raises(ValueError, match=r"data.stream.buffer=3 is too small for 4 ranks and 1 readers.* 4 or more"):
        data.order(world=4)


def test_the_report_on_a_tokenizer_is_of_the_text_that_is_given_now(files, tmp_path):
    said = []
    for number in (1, 2):
        (tmp_path / f"{number}.txt").write_text(prose(100 * number))
        done = door("prepare", *SMALL, *STREAM, f"data.files={tmp_path}/{number}.txt", files[1])
        assert done.returncode == 0, done.stderr
        page = Path(re.search(r"tokenizer: (\S+)", done.stdout)[1])
        made = page.stat().st_mtime_ns
        door("prepare", *SMALL, *STREAM, f"data.files={tmp_path}/{number}.txt", files[1])
        assert page.stat().st_mtime_ns == made  # what is there is not made again
        said.append(re.search(r"the tokenizer on ([\d,]+) bytes", done.stdout)[1])
    assert said[0] != said[1]

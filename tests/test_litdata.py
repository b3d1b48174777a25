"""Tokens of litdata's read while training: every block once, and a run that goes on sees what it would have seen."""

import json
import re
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL, door, prose
from test_resume import assert_same_run, interrupted_at
from test_stream import Recorder, rows

from gptlab.data.litdata_stream import LitDataModule, LitLoader, LitStream
from gptlab.data.module import DataConfig
from gptlab.tokenizer import EOS_ID, ByteTokenizer

pytest.importorskip("litdata")  # no extra that CI installs has it: its torchvision must be of torch's own build
SCRIPT = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs/streaming.md").read_text(), re.DOTALL)[1]
T = 16
FILES, DOCUMENTS = 4, 40
STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the page's own script has written, with its text; chunks are small enough to be several."""
    folder = tmp_path_factory.mktemp("litdata")
    for number in range(FILES):
        lines = (json.dumps({"text": prose(20, 100 * number + row)}) + "\n" for row in range(DOCUMENTS))
        (folder / f"{number}.jsonl").write_text("".join(lines))
    (folder / "held-out.txt").write_text(prose(200, 999))
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "write_tokens.py").write_text(SCRIPT.replace("64MB", "4KB"))
    command = [sys.executable, "write_tokens.py", "tokenizer", f"{folder}/?.jsonl", "tokens"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "tokens").glob("chunk-*"))) > 3
    return folder


def module(folder: Path, batch_size: int = 8, num_workers: int = 0, **options) -> LitDataModule:
    config = DataConfig(validation_files=f"{folder}/held-out.txt", batch_size=batch_size, num_workers=num_workers)
    tokenizer = options.pop("tokenizer", None)
    data = LitDataModule(config, LitStream(f"{folder}/tokens", None), tokenizer, block_size=T, seed=1, **options)
    data.prepare_data()
    data.setup()
    return data


def loader(folder: Path, accumulate: int = 1, rank: int = 0, world: int = 1, **options) -> LitLoader:
    data = module(folder, **options)
    return data.reading(data.order(accumulate, rank, world), pin_memory=False)


def epochs(loader: LitLoader, count: int) -> list[np.ndarray]:
    found = []
    for epoch in range(count):
        loader.order.set_epoch(epoch)
        found += [rows(batch) for batch in loader]
    return found


def blocks(folder: Path) -> list[bytes]:
    """Every block of T + 1 tokens of every chunk, cut by other code from the files as they lie."""
    found = []
    for chunk in json.loads((folder / "tokens/index.json").read_text())["chunks"]:
        content = (folder / "tokens" / chunk["filename"]).read_bytes()
        tokens = np.frombuffer(content[4 * (chunk["chunk_size"] + 2) :], "<u2").astype(np.int64)
        assert len(tokens) == chunk["dim"]
        whole = tokens[: len(tokens) // (T + 1) * (T + 1)].reshape(-1, T + 1)
        found += [row.tobytes() for row in whole]
    return found


def test_the_page_s_script_writes_every_document(folder):
    lines = "".join((folder / f"{number}.jsonl").read_text() for number in range(FILES)).splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    tokens = []
    for chunk in json.loads((folder / "tokens/index.json").read_text())["chunks"]:
        content = (folder / "tokens" / chunk["filename"]).read_bytes()
        tokens += np.frombuffer(content[4 * (chunk["chunk_size"] + 2) :], "<u2").tolist()
    spelt = ByteTokenizer().decode_bytes([i if i != EOS_ID else 13 for i in tokens]).decode().split("\0")
    assert sorted(spelt[:-1]) == sorted(texts)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_block_is_seen_once_an_epoch_in_another_order(folder, num_workers):
    reading = loader(folder, num_workers=num_workers)
    found = epochs(reading, 2)
    halves = [[row.tobytes() for batch in part for row in batch] for part in np.array_split(found, 2)]
    for half in halves:
        assert not Counter(half) - Counter(blocks(folder))
        assert len(half) == len(reading) * 8
        assert len(blocks(folder)) - len(half) < 8 * max(1, num_workers) + FILES
    assert halves[0] != halves[1]
    assert sorted((folder / "tokens").glob("chunk-*"))  # reading has removed nothing


@pytest.mark.parametrize(("num_workers", "accumulate"), [(0, 1), (0, 3), (2, 1)])
def test_resumed_from_every_position(folder, num_workers, accumulate):
    """With the state of batches that are processed, while one more is fetched, and by it more than once."""
    options = {"num_workers": num_workers, "accumulate": accumulate, "batch_size": 32}
    whole = epochs(loader(folder, **options), 3)
    going, states = loader(folder, **options), []
    for epoch in range(3):
        going.order.set_epoch(epoch)
        for index, _ in enumerate(going):
            going.progress = lambda index=index: index
            states.append(json.loads(json.dumps(going.state_dict())))
    steps = len(going)
    assert steps % accumulate == 0
    for done, state in list(enumerate(states))[:: 5 if num_workers else 1]:
        for _ in range(1 if done % 7 else 2):  # the state is not spent
            resumed = loader(folder, **options)
            resumed.load_state_dict(state)
            rest = [rows(batch) for batch in resumed]
            assert len(rest) == steps - done % steps
            assert all(map(np.array_equal, rest, whole[done : done + len(rest)])), done
        # and on into the next epoch
        if done % steps and done < 2 * steps:
            resumed.order.set_epoch(done // steps + 1)
            after = [rows(batch) for batch in resumed]
            assert all(map(np.array_equal, after, whole[(done // steps + 1) * steps :]))


def test_a_state_is_not_changed_by_going_on(folder):
    reading = loader(folder)
    batches = iter(reading)
    for _ in range(5):
        next(batches)
    reading.progress = lambda: 4
    state = reading.state_dict()
    before = deepcopy(state)
    resumed = loader(folder)
    resumed.load_state_dict(state)
    epochs(resumed, 1)
    assert state == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_went_on_can_be_interrupted_again(folder, num_workers):
    whole = epochs(loader(folder, num_workers=num_workers), 1)
    state, done = None, 0
    for more in (5, 1, 9, 17, 2):
        going = loader(folder, num_workers=num_workers)
        if state is not None:
            going.load_state_dict(state)
        batches = iter(going)
        for batch in range(done, done + more + 1):  # one more than is processed
            assert np.array_equal(rows(next(batches)), whole[batch])
        done += more
        going.progress = lambda done=done: done
        state = json.loads(json.dumps(going.state_dict()))


def test_reading_draws_nothing_from_torch(folder):
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    epochs(loader(folder), 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_goes_on_exactly_where_an_exception_stopped_it(folder, tmp_path, accumulate):
    from lightning.pytorch.callbacks import OnExceptionCheckpoint
    from test_stream import trainer_with

    options = {"accumulate": accumulate, "batch_size": 64}
    quiet = {"accumulate_grad_batches": accumulate, "enable_checkpointing": False}
    whole, reading = Recorder(), loader(folder, **options)
    trainer_with(reading, tmp_path, **quiet).fit(whole, reading)
    count = 3 * len(reading)
    for fail_at in range(0, count, 5 * accumulate):
        saving = OnExceptionCheckpoint(tmp_path, f"at-{fail_at}")
        reading, broken = loader(folder, **options), Recorder(fail_at)
        with pytest.raises(KeyError, match="asked for"):
            trainer_with(reading, tmp_path, callbacks=[saving], accumulate_grad_batches=accumulate).fit(broken, reading)
        reading, rest = loader(folder, **options), Recorder()
        trainer_with(reading, tmp_path, **quiet).fit(rest, reading, ckpt_path=saving.ckpt_path)
        assert len(broken.seen) + len(rest.seen) == count
        assert all(map(np.array_equal, broken.seen + rest.seen, whole.seen)), fail_at


def test_ranks_see_disjoint_blocks_and_as_many(folder, monkeypatch):
    found = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("GLOBAL_RANK", str(rank))
        found.append(epochs(loader(folder, rank=rank, world=2), 1))
    assert len(found[0]) == len(found[1])
    rows_of = [Counter(row.tobytes() for batch in part for row in batch) for part in found]
    together = rows_of[0] + rows_of[1]
    assert not together - Counter(blocks(folder))
    assert len(blocks(folder)) - together.total() < 2 * 8 + FILES


RUN = (
    *("data=litdata", f"trainer.max_steps={STEPS}", "data.batch_size=64", "trainer.accumulate_grad_batches=2"),
    *("model.dropout=0.3", "checkpoint.every_steps=1", "checkpoint.keep_last=100", "validation.every_steps=4"),
    *("samples.every_steps=3", "samples.max_tokens=5", "data.files=null"),
)


def own(folder: Path) -> tuple[str, ...]:
    return f"data.stream.folder={folder}/tokens", f"data.validation_files={folder}/held-out.txt"


def test_a_run_goes_on_from_every_step(train, tmp_path, folder, capsys):
    whole = tmp_path / "whole"
    assert train(whole, *RUN, *own(folder)) == 0
    assert "training tokens in " in capsys.readouterr().out
    result = json.loads((whole / "result.json").read_text())
    assert result["epochs"] > 1
    for step in range(1, STEPS, 2):
        part = interrupted_at(whole, step, tmp_path / f"part-{step}")
        assert train(part, f"resume={part}", "seed=77") == 0
        assert_same_run(whole, part)


def test_another_number_of_ranks_is_refused(train, tmp_path, folder):
    whole = tmp_path / "whole"
    assert train(whole, *RUN, *own(folder), "trainer.max_steps=3") == 0
    part = interrupted_at(whole, 2, tmp_path / "part")
    done = door("train", f"resume={part}", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert done.returncode == 2
    assert "the run was trained on data with ranks 1 and now finds 2" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data.stream.folder=null",), "data=litdata reads data.stream.folder, which is null"),
        (("data.stream.folder=nowhere",), "no index.json of litdata's there"),
        (("data.validation_files=null",), "data=litdata needs data.validation_files"),
        (("data.files=a.txt",), "data=litdata reads tokens, and data.files is text"),
        (("data.stride=4",), "data.stride=4: windows of data=litdata stand side by side"),
        (("data.batch_size=5000",), "an optimizer step takes 10000 windows"),
        (("trainer=tp", "trainer.accelerator=cpu", "trainer.devices=2"), "data=litdata gives every rank other windows"),
    ],
)
def test_what_cannot_be_is_said_before_a_step(folder, overrides, says):
    done = door("train", *SMALL, *RUN, *own(folder), *overrides)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


def test_prepare_shows_validation(folder, tmp_path):
    done = door("prepare", "data=litdata", *own(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the tokenizer on" in done.stdout


def test_the_tokenizer_is_the_one_that_made_the_tokens(folder, tmp_path):
    from gptlab.tokenizer import CharTokenizer

    assert module(folder).tokenizer.fingerprint == ByteTokenizer().fingerprint
    with pytest.raises(ValueError, match="is not the tokenizer that made"):
        module(folder, tokenizer=CharTokenizer("abc"))
    (folder / "tokens/tokenizer").rename(folder / "away")
    try:
        with pytest.raises(ValueError, match=r"says nothing of the tokenizer that made it: give tokenizer.path"):
            module(folder)
        data = module(folder, tokenizer=CharTokenizer("abc"))
        with pytest.raises(ValueError, match=r"holds the token \d+, and the tokenizer knows 16"):
            next(iter(data.reading(data.order(), pin_memory=False)))
    finally:
        (folder / "away").rename(folder / "tokens/tokenizer")

"""Text that is read while training: the windows are those of the built file, and go on from anywhere, on any ranks."""

import csv
import json
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from conftest import prose
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from gptlab.data.cleaning import Cleaned, Cleaning
from gptlab.data.corpus import Files
from gptlab.data.document import Document
from gptlab.data.formats import Reading
from gptlab.data.listed import Copies, text_files
from gptlab.data.stream import Place, StreamLoader, Text
from gptlab.data.tokens import prepare
from gptlab.data.windows import TrainingOrder, WindowDataset
from gptlab.tokenizer import EOS_ID, ByteTokenizer

T = 16
SHARDS, DOCUMENTS = 5, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of seven documents each, all different."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        rows = [{"text": f"{shard}.{row} " + prose(12 + 5 * row, 100 * shard + row)} for row in range(DOCUMENTS)]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def loaders():
    """Makes loaders, and ends their threads when the test is over."""
    made = []

    def make(
        files,
        batch_size: int = 4,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        epoch_windows: int = 40,
        **changes,
    ):
        settings = {"block_size": T, "buffer": 7, "readers": 1, "seed": 1, "tokenizer": ByteTokenizer()}
        source = changes.pop("source", None) or Files(str(files))
        text = Text(text_files(str(files)), source, cache=Path("cache"), **(settings | changes))
        order = TrainingOrder(epoch_windows, batch_size, accumulate, text.seed, rank, world)
        loader = StreamLoader(text, order, pin_memory=False)
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()


def rows(batch) -> np.ndarray:
    """The windows of a batch, whole."""
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["loss_mask"].all()
    return torch.cat((batch["tokens"], batch["targets"][:, -1:]), 1).numpy()


def epochs(loader, count: int) -> list[np.ndarray]:
    """The batches of so many epochs."""
    found = []
    for epoch in range(count):
        loader.order.set_epoch(epoch)
        found += [rows(batch) for batch in loader]
    return found


def documents_of(windows: np.ndarray) -> list[str]:
    """The documents that windows in order spell, the last of them perhaps cut."""
    tokens = np.append(windows[:, :-1].reshape(-1), windows[-1, -1])
    text = ByteTokenizer().decode_bytes([i if i != EOS_ID else 13 for i in tokens])  # byte 0 stands in no document
    return text.decode().split("\0")


def test_windows_are_those_of_the_built_file_for_the_same_order_of_shards(folder, loaders, tmp_path):
    """The order is read off the documents themselves; the built file is made by other code."""
    windows = np.concatenate(epochs(loaders(f"{folder}/*.jsonl", buffer=1, epoch_windows=1200), 1))
    found = documents_of(windows)
    order = list(dict.fromkeys(document[0] for document in found[: SHARDS * DOCUMENTS]))
    assert sorted(order) == list("01234")
    assert order != sorted(order)
    assert [document.split()[0] for document in found[: SHARDS * DOCUMENTS]] == [
        f"{shard}.{row}" for shard in order for row in range(DOCUMENTS)
    ]
    (tmp_path / "held-out.txt").write_text("held out")
    built = prepare(
        Files([f"{folder}/{shard}.jsonl" for shard in order]),
        ByteTokenizer(),
        validation_source=Files("held-out.txt"),
        validation_fraction=0.1,
        cache=tmp_path / "cache",
    )
    expected = WindowDataset(built.train, T, T)
    assert len(expected) > 300
    for index in range(len(expected)):
        assert np.array_equal(windows[index, :-1], expected[index]["tokens"])
        assert np.array_equal(windows[index, 1:], expected[index]["targets"])
    # What does not fill a window goes on with the next turn, which has another order, and every document once.
    turns = [
        [document.split()[0] for document in found[SHARDS * DOCUMENTS * n :][: SHARDS * DOCUMENTS]] for n in range(3)
    ]
    assert len({tuple(turn) for turn in turns}) == 3
    assert all(sorted(turn) == sorted(turns[0]) for turn in turns)


def test_windows_are_shuffled_within_their_block_and_otherwise_each_time(folder, loaders):
    plain = np.concatenate(epochs(loaders(f"{folder}/*.jsonl", buffer=1, epoch_windows=280), 1))
    mixed = np.concatenate(epochs(loaders(f"{folder}/*.jsonl", buffer=20, epoch_windows=280), 1))
    orders = set()
    for start in range(0, 280, 20):
        before = [row.tobytes() for row in plain[start : start + 20]]
        after = [row.tobytes() for row in mixed[start : start + 20]]
        assert Counter(before) == Counter(after)
        orders.add(tuple(before.index(row) for row in after))
    assert len(orders) == 14
    assert tuple(range(20)) not in orders
    other = np.concatenate(epochs(loaders(f"{folder}/*.jsonl", buffer=20, epoch_windows=280, seed=2), 1))
    assert not np.array_equal(mixed[:20], other[:20])


def test_readers_share_the_text_files_each_turn_and_alternate(folder, loaders):
    windows = np.concatenate(epochs(loaders(f"{folder}/*.jsonl", buffer=1, readers=2, epoch_windows=600), 1))
    turns = []
    for reader in range(2):
        found = [document.split()[0] for document in documents_of(windows[reader::2])[:-1]]
        shards = [found[start].split(".")[0] for start in range(0, len(found), DOCUMENTS)]
        assert all(
            found[n * DOCUMENTS + row] == f"{shard}.{row}" for n, shard in enumerate(shards[:-1]) for row in range(7)
        )
        turns.append(shards)
    # Three shards and two in the first turn, two and three in the next: nobody always has more to do.
    assert sorted(turns[0][:3] + turns[1][:2]) == sorted(turns[0][3:5] + turns[1][2:5]) == list("01234")
    assert turns[0][:3] != turns[0][3:6]


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_windows_of_one_process_and_none_is_seen_twice(folder, loaders, world, readers):
    whole = epochs(loaders(f"{folder}/*.jsonl", 12, readers=readers, epoch_windows=96), 2)
    parts = [
        epochs(loaders(f"{folder}/*.jsonl", 12 // world, rank, world, readers=readers, epoch_windows=96), 2)
        for rank in range(world)
    ]
    for index, batch in enumerate(whole):
        for rank in range(world):
            assert np.array_equal(parts[rank][index], batch[rank::world])


def test_a_rank_reads_no_more_shards_than_its_own_readers_do(folder, loaders):
    assert [sorted(loaders(f"{folder}/*.jsonl", 1, rank, 2, readers=4).readers) for rank in range(2)] == [
        [0, 2],
        [1, 3],
    ]
    assert [sorted(loaders(f"{folder}/*.jsonl", 1, rank, 4, readers=2).readers) for rank in range(4)] == [[0], [1]] * 2
    assert [sorted(loaders(f"{folder}/*.jsonl", 1, rank, 2, readers=3).readers) for rank in range(2)] == [[0, 1, 2]] * 2


def state_at(loader, done: int) -> dict:
    """The state when `done` batches of all are processed, as Lightning counts: at the end of an epoch, not after it."""
    steps = len(loader)
    epoch = max(0, done - 1) // steps
    loader.order.epoch = epoch
    loader.progress = lambda: done - epoch * steps
    return json.loads(json.dumps(loader.state_dict()))


@pytest.mark.parametrize(("buffer", "readers"), [(7, 1), (1, 1), (50, 1), (3, 2), (11, 3)])
def test_resumed_from_every_position(folder, loaders, buffer, readers):
    """In mid-block, across blocks, shards, turns through the text and epochs; one batch more was always fetched."""
    options = {"buffer": buffer, "readers": readers, "epoch_windows": 44}  # eleven batches; a turn is 350 windows or so
    whole = epochs(loaders(f"{folder}/*.jsonl", **options), 10)
    going = loaders(f"{folder}/*.jsonl", **options)
    states, places = [], set()
    for epoch in range(10):
        going.order.set_epoch(epoch)
        for index, _ in enumerate(going):
            states.append(state_at(going, epoch * len(going) + index))
            going.order.epoch = epoch
            places |= {tuple(place[1:4]) for place in states[-1]["places"]}
    assert len({place[0] for place in places}) > 1  # turns
    assert len({place[1] for place in places}) > 1  # shards
    for done, state in enumerate(states):
        resumed = loaders(f"{folder}/*.jsonl", **options)
        resumed.load_state_dict(state)
        assert resumed.order.epoch == done // len(resumed)
        rest = [rows(batch) for batch in resumed]
        expected = whole[done : (done // len(resumed) + 1) * len(resumed)]
        assert len(rest) == len(expected)
        assert all(map(np.array_equal, rest, expected)), done
        resumed.close()


def test_a_run_that_went_on_can_be_interrupted_again(folder, loaders):
    options = {"buffer": 9, "readers": 2, "epoch_windows": 1000}
    whole = epochs(loaders(f"{folder}/*.jsonl", **options), 1)
    state, done = None, 0
    for more in (5, 1, 30, 70, 2, 100):
        going = loaders(f"{folder}/*.jsonl", **options)
        if state is not None:
            going.load_state_dict(state)
        batches = iter(going)
        for batch in range(done, done + more + 1):  # one more than is processed
            assert np.array_equal(rows(next(batches)), whole[batch])
        done += more
        state = state_at(going, done)
        going.close()


def test_a_state_is_small_and_goes_on_with_other_ranks_and_batches(folder, loaders):
    options = {"readers": 1, "epoch_windows": 48}
    whole = epochs(loaders(f"{folder}/*.jsonl", 12, **options), 3)
    loader = loaders(f"{folder}/*.jsonl", 12, **options)
    epochs(loader, 2)
    state = state_at(loader, 6)
    assert len(json.dumps(state)) < 200
    halves = [loaders(f"{folder}/*.jsonl", 3, rank, 2, accumulate=2, **options) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    parts = [[rows(batch) for batch in half] for half in halves]
    got = [np.concatenate([part[i + j] for j in range(2) for part in parts]) for i in range(0, len(parts[0]), 2)]
    assert len(got) == 2
    for batch, expected in zip(got, whole[6:8], strict=True):
        assert Counter(row.tobytes() for row in batch) == Counter(row.tobytes() for row in expected)


def test_places_of_other_ranks_are_asked_for(folder, loaders, monkeypatch):
    """Of two ranks with a reader each, either one's state says where both are."""
    both = [loaders(f"{folder}/*.jsonl", 2, rank, 2, readers=2) for rank in range(2)]
    alone = loaders(f"{folder}/*.jsonl", 4, readers=2)
    for loader in (*both, alone):
        epochs(loader, 1)
        loader.progress = lambda: 7
    places = []

    def gather(known, own):
        places.append(own)
        known[:] = places if len(places) == 2 else [own, own]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(KeyError):  # the first one has not heard of the other here
        both[0].state_dict()
    assert both[1].state_dict() == alone.state_dict()


# Through Lightning


class Recorder(LightningModule):
    """Trains nothing, keeps the windows that it was given, and fails at a batch if it is asked to."""

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.fail_at = [], fail_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise KeyError("asked for")
        self.seen.append(rows(batch))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_with(loader, folder: Path, **options) -> Trainer:
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder, **options,
    )  # fmt: skip
    loader.progress = lambda: trainer.fit_loop.epoch_loop.batch_progress.current.processed
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("readers", [1, 2])
def test_the_trainer_goes_on_exactly_where_an_exception_stopped_it(folder, loaders, tmp_path, accumulate, readers):
    options = {"accumulate": accumulate, "readers": readers, "epoch_windows": 24}
    whole = Recorder()
    loader = loaders(f"{folder}/*.jsonl", **options)
    quiet = {"accumulate_grad_batches": accumulate, "enable_checkpointing": False}
    trainer_with(loader, tmp_path, **quiet).fit(whole, loader)
    assert len(whole.seen) == 18
    for fail_at in range(0, 18, accumulate):
        saving = OnExceptionCheckpoint(tmp_path, f"at-{fail_at}")
        loader, broken = loaders(f"{folder}/*.jsonl", **options), Recorder(fail_at)
        with pytest.raises(KeyError, match="asked for"):
            trainer_with(loader, tmp_path, callbacks=[saving], accumulate_grad_batches=accumulate).fit(broken, loader)
        loader, rest = loaders(f"{folder}/*.jsonl", **options), Recorder()
        trainer = trainer_with(loader, tmp_path, **quiet)
        trainer.fit(rest, loader, ckpt_path=saving.ckpt_path)
        assert len(broken.seen) + len(rest.seen) == 18
        assert all(map(np.array_equal, broken.seen + rest.seen, whole.seen)), fail_at


# What is read


def test_every_format_is_read_and_large_documents_in_parts(tmp_path, loaders, monkeypatch):
    monkeypatch.setattr("gptlab.data.formats.WHOLE_BYTES", 200)
    monkeypatch.setattr("gptlab.data.formats.PART_BYTES", 100)
    texts = {name: f"{name} " + prose(60, seed) for seed, name in enumerate(("a.txt", "b.csv", "c.jsonl.gz"))}
    (tmp_path / "a.txt").write_text(texts["a.txt"])
    with open(tmp_path / "b.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], [texts["b.csv"]]])
    with fsspec.open(f"{tmp_path}/c.jsonl.gz", "wt", compression="gzip") as file:
        file.write(json.dumps({"text": texts["c.jsonl.gz"]}))
    windows = np.concatenate(epochs(loaders(f"{tmp_path}/?.*", buffer=1, epoch_windows=160), 1))
    assert sorted(documents_of(windows)[:3]) == sorted(texts.values())


def test_ids_past_16_bits_stay_whole(folder, loaders):
    class Large(ByteTokenizer):
        vocab_size = 2**17

        def encode(self, text):
            return super().encode(text) + 2**16

    small, large = (epochs(loaders(f"{folder}/*.jsonl", tokenizer=kind), 1) for kind in (ByteTokenizer(), Large()))
    for one, other in zip(small, large, strict=True):
        assert np.array_equal(np.where(one == EOS_ID, one, one + 2**16), other)


def test_documents_are_cleaned_as_they_come(tmp_path, loaders):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", "A\u030a" * 20)))
    source = Cleaned(Files(f"{tmp_path}/a.jsonl"), Cleaning("NFC", 10, None, 0.8))
    windows = np.concatenate(epochs(loaders(f"{tmp_path}/a.jsonl", source=source, buffer=1), 1))
    assert set(documents_of(windows)[:-1]) == {"Å" * 20}


def test_a_text_of_which_nothing_is_left_is_said_and_does_not_go_on_for_ever(tmp_path, loaders):
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n')
    source = Cleaned(Files(f"{tmp_path}/a.jsonl"), Cleaning(None, 10, None, 0.8))
    with pytest.raises(ValueError, match=r"no text in 1 files; look at data.min_characters"):
        epochs(loaders(f"{tmp_path}/a.jsonl", source=source), 1)


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_a_file_of_which_nothing_is_left_ends_no_run(tmp_path, loaders, readers):
    for name, text in (("a", "short"), ("b", "long enough to stay"), ("c", "long enough to stay as well")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    source = Cleaned(Files(f"{tmp_path}/*.jsonl"), Cleaning(None, 10, None, 0.8))
    windows = np.concatenate(epochs(loaders(f"{tmp_path}/*.jsonl", source=source, readers=readers), 2))
    assert not any(b"short" in ByteTokenizer().decode_bytes(window) for window in windows)
    for path in tmp_path.glob("[bc].jsonl"):
        path.write_text('{"text": "short"}\n')
    with pytest.raises(ValueError, match=r"no text in 3 files; look at data.min_characters"):
        epochs(loaders(f"{tmp_path}/*.jsonl", source=source, readers=readers), 1)


def test_what_is_wrong_in_a_shard_is_said_with_file_and_line(folder, tmp_path, loaders):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a.jsonl: line 2 is no JSON"):
        epochs(loaders(f"{tmp_path}/a.jsonl"), 1)


def test_a_shard_that_changes_while_the_run_goes_on_is_refused(tmp_path, loaders):
    (tmp_path / "a.txt").write_text("some text\n")
    loader = loaders(f"{tmp_path}/a.txt")
    (tmp_path / "a.txt").write_text("other text\n")
    with pytest.raises(ValueError, match=r"a.txt was 10 bytes .* and now is 11 bytes .*: put it back as it was"):
        epochs(loader, 1)


def test_memory_does_not_grow_with_the_text(tmp_path, loaders):
    peaks = []
    for files in (4, 40):
        folder = tmp_path / str(files)
        folder.mkdir()
        for number in range(files):
            (folder / f"{number}.jsonl").write_text(
                "".join(json.dumps({"text": prose(60, n)}) + "\n" for n in range(100))
            )
        loader = loaders(f"{folder}/*.jsonl", 32, buffer=64, epoch_windows=1000 * files)
        tracemalloc.start()
        for _ in loader:
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        loader.close()
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 2_000_000


def test_reading_goes_on_beside_training_and_ends_with_the_loader(folder, loaders):
    """While a block is used the next one is made; and no thread is left that reads on."""

    class Slow(Files):
        def read(self, path):
            for number, document in enumerate(super().read(path)):
                time.sleep(0.5)
                yield Document(document.name, document.text * 5 if number % 2 else document.text)

    before = threading.active_count()
    loader = loaders(f"{folder}/*.jsonl", 2, buffer=20, source=Slow(f"{folder}/*.jsonl"))
    batches = iter(loader)
    next(batches)
    time.sleep(1.5)  # a step
    start = time.monotonic()
    for _ in range(10):
        next(batches)
    assert time.monotonic() - start < 0.4  # less than a document takes
    assert threading.active_count() > before
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 3
    assert threading.active_count() == before


def test_no_file_stays_open_when_reading_ends(tmp_path, loaders):
    """A generator that is left alone would close its file when Python ends, and fail with modules that are gone."""
    (tmp_path / "a.jsonl").write_text('{"text": "a few words"}\n' * 5000)
    loader = loaders(f"{tmp_path}/a.jsonl")
    batches = iter(loader)
    next(batches)

    def is_open() -> bool:
        return any(path.resolve() == tmp_path / "a.jsonl" for path in Path("/proc/self/fd").iterdir() if path.exists())

    assert is_open()
    loader.close()
    assert not is_open()


# Shards elsewhere


@pytest.fixture
def elsewhere(folder):
    """The same shards, in memory by URL."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in folder.glob("*.jsonl"):
        system.pipe(f"/shards/{path.name}", path.read_bytes())
    yield "memory://shards/*.jsonl"
    system.store.clear()


def test_shards_by_url_are_copied_one_after_another_and_removed(folder, elsewhere, loaders):
    here = np.concatenate(epochs(loaders(f"{folder}/*.jsonl", buffer=1, epoch_windows=400), 1))
    loader = loaders(elsewhere, buffer=1, epoch_windows=400)
    loader.order.set_epoch(0)
    seen, found = [], set()
    for batch in loader:
        seen.append(rows(batch))
        found.add(len(list(Path("cache/copies").glob("*/*.jsonl"))))
    assert np.array_equal(np.concatenate(seen), here)
    assert max(found) <= 2  # the one that is read, and the next
    loader.close()
    assert [path.name for path in Path("cache/copies").iterdir()] == ["guard"]


def test_a_file_elsewhere_that_changes_while_the_run_goes_on_is_refused(elsewhere, loaders):
    loader = loaders(elsewhere)
    for number in range(SHARDS):
        fsspec.filesystem("memory").pipe(f"/shards/{number}.jsonl", b'{"text": "other"}')
    with pytest.raises(ValueError, match=r"memory://.* had \d+ bytes when the run began, and now has 17"):
        epochs(loader, 1)


def test_a_copy_that_takes_long_is_not_waited_for_in_the_end(elsewhere, loaders, monkeypatch):
    begun = threading.Event()

    def slow(url, target, stopped):
        begun.set()
        while not stopped():
            time.sleep(0.01)
        raise InterruptedError

    monkeypatch.setattr("gptlab.data.listed.copy", slow)
    loader = loaders(elsewhere)

    def ask():
        with pytest.raises(OSError):
            next(iter(loader))

    asking = threading.Thread(target=ask)
    asking.start()
    assert begun.wait(5)
    start = time.monotonic()
    loader.close()
    asking.join()
    assert time.monotonic() - start < 1


def test_copies_that_a_killed_process_has_left_are_removed_by_the_next(elsewhere, loaders):
    left = Path("cache/copies/1-killed")
    left.mkdir(parents=True)
    (left / "0.jsonl").write_text("{}")
    Path("cache/copies/1-killed.lock").touch()
    used = Copies(Path("cache"))
    shard = text_files(elsewhere)[0]
    own = used.get(shard)
    assert not left.exists()
    other = Copies(Path("cache"))
    other.get(shard)
    assert own.exists()  # of a process that lives
    used.close()
    other.close()
    assert not own.exists()


def test_shards_are_known_by_name_size_and_version(folder, elsewhere):
    system = fsspec.filesystem("memory")
    before = text_files(elsewhere)
    assert [shard.place for shard in before] == [f"memory:///shards/{number}.jsonl" for number in range(SHARDS)]
    assert [shard.size for shard in before] == [path.stat().st_size for path in sorted(folder.glob("*.jsonl"))]
    assert text_files(elsewhere) == before
    system.pipe("/shards/3.jsonl", system.cat("/shards/3.jsonl"))
    assert [a == b for a, b in zip(before, text_files(elsewhere), strict=True)] == [True] * 3 + [False, True]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "data.files is empty"),
        ("nothing-*.jsonl", "matches no file"),
        ("memory://shards/nothing-*.jsonl", "matches nothing"),
        ("nowhere://a/b.txt", "nowhere"),
    ],
)
def test_shards_that_are_not_there_are_said(files, says):
    with pytest.raises(ValueError, match=says):
        text_files(files)


def test_a_shard_that_is_named_twice_is_refused(folder, elsewhere):
    with pytest.raises(ValueError, match="named twice"):
        text_files([f"{folder}/1.jsonl", f"{folder}/*.jsonl"])
    with pytest.raises(ValueError, match="named twice"):
        text_files(["memory://shards/1.jsonl", elsewhere])


def test_a_place_is_plain_numbers():
    assert list(Place(1, 2, 3, 4)) == [1, 2, 3, 4]


def test_reading_of_rows_is_that_of_the_config(tmp_path, loaders):
    (tmp_path / "a.jsonl").write_text('{"body": "the body of it"}\n')
    source = Files(f"{tmp_path}/a.jsonl", Reading(field="body"))
    windows = np.concatenate(epochs(loaders(f"{tmp_path}/a.jsonl", source=source, buffer=1), 1))
    assert set(documents_of(windows)[:-1]) == {"the body of it"}

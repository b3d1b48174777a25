"""Windows and their order: every target once in validation, every window at most once an epoch, and the same order
for any number of ranks and workers, and after any interruption."""

import itertools
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from gptlab.data.tokens import TokenFile
from gptlab.data.windows import (
    DocumentWindows,
    JoinedWindows,
    ScoringOrder,
    TrainingOrder,
    WindowDataset,
    WindowLoader,
    permute,
    window_count,
)
from gptlab.tokenizer import EOS_ID


def flat(lists) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def shuffled(count: int, key: str = "0/0") -> list[int]:
    return permute(np.arange(count), count, key).tolist()


@pytest.fixture
def token_file(tmp_path):
    """Makes a file whose token at position i is i + 1; so 0 is none of them."""

    def make(n_tokens: int) -> TokenFile:
        path = tmp_path / f"{n_tokens}.bin"
        np.arange(1, n_tokens + 1, dtype="<u4").tofile(path)
        return TokenFile(path, "<u4", n_tokens)

    return make


# The shuffle


@pytest.mark.parametrize("sizes", [range(1, 301), (4095, 4096, 4097, 65537)], ids=["small", "large"])
def test_permute_is_a_bijection(sizes):
    for count in sizes:
        assert sorted(shuffled(count)) == list(range(count))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2**40), st.data())
def test_permute_is_one_to_one_at_any_size(count, data):
    positions = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=50))
    together = permute(np.array(positions, dtype=np.int64), count, "k")
    assert len(set(together.tolist())) == len(positions)
    assert all(0 <= value < count for value in together)
    assert [int(permute(np.array([p]), count, "k")[0]) for p in positions] == together.tolist()


def test_permute_differs_by_key_and_count():
    orders = [shuffled(100, "0/0"), shuffled(100, "0/1"), shuffled(100, "1/0"), shuffled(101, "0/0")[:100]]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # about one is to be expected


def test_the_order_of_existing_runs_is_frozen():
    """A run begun with an older gptlab goes on in the same order. If this fails, undo what changed the order."""
    assert shuffled(7) == [5, 1, 2, 6, 3, 0, 4]
    assert shuffled(10) == [8, 4, 6, 3, 0, 9, 1, 5, 7, 2]
    assert permute(np.arange(8), 1000, "1337/2").tolist() == [903, 642, 917, 553, 855, 72, 212, 887]
    some = np.array([0, 1, 10**9, 2 * 10**9 - 1])
    assert permute(some, 2 * 10**9, "0/0").tolist() == [228047899, 592147905, 1802587580, 345197227]
    assert list(TrainingOrder(10, 3, 1, seed=1337)) == [[9, 7, 8], [5, 6, 2], [0, 3, 1]]
    assert list(TrainingOrder(10, 2, 1, seed=1337, rank=1, world=2)) == [[7, 5], [2, 3]]


@pytest.mark.parametrize("count", range(2, 9))
def test_every_place_is_as_likely_as_any(count):
    """Chi-squared over a thousand keys, its (count - 1)^2 degrees of freedom being those of a Latin square."""
    keys = 1000
    found = np.zeros((count, count))
    for key in range(keys):
        found[np.arange(count), permute(np.arange(count), count, f"{key}/0")] += 1
    expected = keys / count
    chi_squared = ((found - expected) ** 2 / expected).sum() * (count - 1) / count
    freedom = (count - 1) ** 2
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_order_is_as_likely_as_any(count):
    """Four rounds of the network fail here by far, at twelve standard deviations."""
    keys, orders = 2400, math.factorial(count)
    found = Counter(tuple(shuffled(count, f"{key}/0")) for key in range(keys))
    expected, freedom = keys / orders, orders - 1
    chi_squared = sum((found[p] - expected) ** 2 / expected for p in itertools.permutations(range(count)))
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_two_billion_windows_start_at_once():
    order = TrainingOrder(2 * 10**9, batch_size=64, accumulate=1, seed=0)
    tracemalloc.start()
    start = time.monotonic()
    batch = next(iter(order))
    seconds = time.monotonic() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(batch)) == 64
    assert max(batch) > 10**9
    assert seconds < 1
    assert peak < 2e6


# Windows


@pytest.mark.parametrize(("n", "block_size", "stride", "windows"), [(9, 4, 4, 2), (8, 4, 4, 1), (8, 4, 1, 4)])
def test_window_count_by_hand(n, block_size, stride, windows):
    assert window_count(n, block_size, stride) == windows


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 15))
def test_windows_are_the_loop(n, block_size, stride):
    tokens = np.random.default_rng(n).integers(0, 1000, n).astype(np.uint16)
    expected = [
        (tokens[i : i + block_size].tolist(), tokens[i + 1 : i + block_size + 1].tolist())
        for i in range(0, n, stride)
        if i + block_size < n
    ]
    dataset = WindowDataset(tokens, block_size, stride)
    assert len(dataset) == window_count(n, block_size, stride) == len(expected)
    found = [dataset[i] for i in range(len(dataset))]
    assert [(item["tokens"].tolist(), item["targets"].tolist()) for item in found] == expected
    assert all(item["loss_mask"].all() for item in found)


def test_a_batch_is_its_windows(token_file):
    dataset = WindowDataset(token_file(50), 8, 3)
    batch = dataset.__getitems__([5, 0, 5])
    assert {name: value.dtype for name, value in batch.items()} == {
        "tokens": torch.int64,
        "targets": torch.int64,
        "loss_mask": torch.bool,
    }
    for row, index in enumerate([5, 0, 5]):
        for name, value in dataset[index].items():
            assert torch.equal(batch[name][row], value)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_validation_scores_every_target_once(n, block_size, batch_size, world):
    tokens = np.arange(n, dtype=np.uint16)
    dataset = WindowDataset(tokens, block_size, block_size, keep_tail=True)
    scored, lengths = [], set()
    for rank in range(world):
        order = ScoringOrder(len(dataset), batch_size, rank, world)
        loader = WindowLoader(dataset, order, num_workers=0, pin_memory=False)
        batches = list(loader)
        lengths.add(len(batches))
        assert len(loader) == len(batches)
        for batch in batches:
            assert batch["tokens"].shape == batch["targets"].shape == (batch_size, block_size)
            keep = batch["loss_mask"]
            assert torch.equal(batch["targets"][keep], batch["tokens"][keep] + 1)
            scored += batch["targets"][keep].tolist()
    assert sorted(scored) == list(range(1, n))  # the first token is no target
    assert len(lengths) == 1  # ranks that wait for each other do so equally often


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.booleans(), st.integers(1, 12), st.integers(1, 15))
def test_document_windows_are_the_loop(sizes, is_cut, block_size, stride):
    """Of documents of these sizes; `is_cut` takes the end of the last."""
    text = flat([*range(5, 5 + size), EOS_ID] for size in sizes)[: -1 if is_cut else None]
    begins = [0, *(at for at, token in enumerate(text[:-1]) if token == EOS_ID and at)]
    starts = []
    for begin, last in itertools.pairwise([*begins, len(text) - 1]):
        starts.append(begin)
        while starts[-1] + block_size < last:  # until `last`, the document's end token, is a target
            starts.append(starts[-1] + stride)
    expected = [text[start : start + block_size + 1] for start in starts if start + block_size < len(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptlab.data.windows.SCAN", 7)  # so that ends lie in several pieces of the file
        dataset = DocumentWindows(np.array(text, dtype=np.uint16), block_size, stride)
    found = [dataset[i] for i in range(len(dataset))]
    assert [[*item["tokens"].tolist(), item["targets"][-1].item()] for item in found] == expected
    assert all(item["loss_mask"].all() and item["tokens"][1:].equal(item["targets"][:-1]) for item in found)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 30), max_size=8), st.booleans(), st.integers(1, 12), st.integers(1, 5))
def test_document_windows_alone_score_every_target_once_after_what_its_document_said(
    sizes, is_cut, block_size, batch_size
):
    text = np.array(flat([*range(5, 5 + size), EOS_ID] for size in sizes)[: -1 if is_cut else None], dtype=np.uint16)
    text = np.where(text == EOS_ID, EOS_ID, 100 + np.arange(len(text)))  # so that a token tells its place
    dataset = DocumentWindows(text, block_size, block_size, alone=True)
    scored = []
    for batch in WindowLoader(dataset, ScoringOrder(len(dataset), batch_size), num_workers=0, pin_memory=False):
        assert batch["tokens"].shape == (batch_size, block_size)
        for tokens, targets, mask in zip(*batch.values(), strict=True):
            assert EOS_ID not in tokens[mask][1:]
            scored += targets[mask].tolist()
    assert sorted(scored) == sorted(text[1:].tolist())  # the first token is no target
    assert dataset.dropped_tokens == 0 or len(text) < 2


# The order


def global_batches(count: int, batch_size: int, accumulate: int, world: int, epoch: int = 0) -> list[list[int]]:
    """The windows of each optimizer step, over all ranks and micro-batches."""
    ranks = []
    for rank in range(world):
        order = TrainingOrder(count, batch_size, accumulate, seed=3, rank=rank, world=world)
        order.set_epoch(epoch)
        ranks.append(list(order))
    assert {len(batches) for batches in ranks} == {len(order)}
    micro = [flat(parts) for parts in zip(*ranks, strict=True)]
    return [sorted(flat(micro[i : i + accumulate])) for i in range(0, len(micro), accumulate)]


def test_joined_windows_are_those_of_each_file_in_turn(token_file):
    parts = [WindowDataset(token_file(n), 4, 4, keep_tail=True) for n in (18, 1, 9, 30)]  # one is too short for any
    joined = JoinedWindows(parts)
    alone = [part[i] for part in parts for i in range(len(part))]
    assert len(joined) == len(alone) == 5 + 0 + 2 + 8
    order = [3, 14, -1, 0, 5, 6, 4, 14]
    batch = joined.__getitems__(order)
    for row, index in enumerate(order):
        expected = alone[index] if index >= 0 else parts[0][-1]
        for name, values in expected.items():
            assert torch.equal(batch[name][row], values)
            assert torch.equal(joined[index][name], values)
    assert not batch["loss_mask"][2].any()


@pytest.mark.parametrize("count", [16, 103, 5001])
def test_steps_are_the_same_for_any_ranks_and_accumulation(count):
    expected = global_batches(count, 16, 1, 1)
    assert len(expected) == count // 16
    for batch_size, accumulate, world in [(8, 1, 2), (4, 1, 4), (4, 4, 1), (2, 2, 4), (8, 2, 1), (1, 1, 16)]:
        assert global_batches(count, batch_size, accumulate, world) == expected


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (9001, 7), (9001, 5000), (12288, 4096)])
def test_a_window_is_seen_at_most_once_an_epoch(count, batch_size):
    """Also across the pieces in which the shuffle is computed."""
    order = TrainingOrder(count, batch_size, 1, seed=0)
    epochs = []
    for epoch in range(3):
        order.set_epoch(epoch)
        seen = flat(order)
        assert len(seen) == len(set(seen)) == count // batch_size * batch_size
        assert set(seen) <= set(range(count))
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    if count % batch_size:
        assert len({frozenset(range(count)) - frozenset(seen) for seen in epochs}) > 1  # others are left out


def test_another_seed_is_another_order():
    one, other = (list(TrainingOrder(100, 10, 1, seed)) for seed in (0, 1))
    assert one != other


def test_an_iteration_begins_at_the_start_again():
    order = TrainingOrder(20, 4, 1, seed=0)
    order.start = 3
    resumed = list(order)
    assert len(resumed) == 2
    assert list(order)[3:] == resumed
    assert len(list(order)) == len(order) == 5


@pytest.mark.parametrize(("accumulate", "world", "windows"), [(1, 1, 4), (3, 1, 12), (2, 2, 16)])
def test_too_few_windows_for_a_step_are_an_error(accumulate, world, windows):
    assert len(TrainingOrder(windows, 4, accumulate, seed=0, world=world)) == accumulate
    with pytest.raises(ValueError, match=rf"takes {windows} windows and the training split has {windows - 1}") as error:
        TrainingOrder(windows - 1, 4, accumulate, seed=0, world=world)
    for remedy in ("data.batch_size", "accumulate_grad_batches", "data.stride", "model.block_size", "add text"):
        assert remedy in str(error.value)


# The loader


def make_loader(tokens, batch_size: int = 3, num_workers: int = 0, rank: int = 0, world: int = 1) -> WindowLoader:
    dataset = WindowDataset(tokens, block_size=4, stride=2)
    order = TrainingOrder(len(dataset), batch_size, 1, seed=0, rank=rank, world=world)
    return WindowLoader(dataset, order, num_workers, pin_memory=False)


def firsts(loader: WindowLoader) -> list[list[int]]:
    return [batch["tokens"][:, 0].tolist() for batch in loader]


def epochs_of(loader: WindowLoader, n: int) -> list[list[int]]:
    batches = []
    for epoch in range(n):
        loader.order.set_epoch(epoch)
        batches += firsts(loader)
    return batches


@pytest.mark.parametrize("read_ahead", [1, 24, 48, 2**16])
def test_resumed_from_every_position(token_file, monkeypatch, read_ahead):
    """As of an uninterrupted run, also at and across the end of an epoch, however many batches are read ahead."""
    monkeypatch.setattr("gptlab.data.windows.READ_AHEAD", read_ahead)
    tokens = token_file(60)
    loader = make_loader(tokens)
    whole = epochs_of(loader, 3)
    steps = len(loader)
    assert steps == 9
    for done in range(2 * steps + 1):
        epoch, processed = max(0, done - 1) // steps, done - max(0, done - 1) // steps * steps
        loader.order.set_epoch(epoch)
        loader.progress = lambda processed=processed: processed
        state = loader.state_dict()
        resumed = make_loader(tokens)
        resumed.load_state_dict(state)
        rest = firsts(resumed)
        assert whole[done : done + len(rest)] == rest
        assert len(rest) == steps - done % steps
        assert resumed.order.epoch == done // steps


def test_a_position_holds_for_any_number_of_ranks(token_file):
    tokens = token_file(60)
    loader = make_loader(tokens, batch_size=4)
    loader.progress = lambda: 2
    state = loader.state_dict()
    assert state == {"epoch": 0, "windows": 8}
    rest = firsts(loader)[2:]
    ranks = []
    for rank in range(2):
        half = make_loader(tokens, batch_size=2, rank=rank, world=2)
        half.load_state_dict(state)
        ranks.append(firsts(half))
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in rest]


def test_setting_the_epoch_it_is_in_keeps_the_position():
    order = TrainingOrder(20, 4, 1, seed=0)
    order.epoch, order.start = 2, 3
    order.set_epoch(2)
    assert order.start == 3
    order.set_epoch(3)
    assert order.start == 0


def test_workers_give_the_same_batches(token_file):
    tokens = token_file(60)
    assert firsts(make_loader(tokens, num_workers=2)) == firsts(make_loader(tokens))


@pytest.mark.parametrize("read_ahead", [1, 24, 2**16])
def test_read_ahead_a_validation_split_is_what_it_is_window_by_window(token_file, monkeypatch, read_ahead):
    """With its partial last window, and a batch that is filled up."""
    monkeypatch.setattr("gptlab.data.windows.READ_AHEAD", read_ahead)
    windows = WindowDataset(token_file(60), block_size=4, stride=4, keep_tail=True)
    found = list(WindowLoader(windows, ScoringOrder(len(windows), 4), num_workers=0, pin_memory=False))
    assert [len(batch["tokens"]) for batch in found] == [4] * len(found)
    for name in ("tokens", "targets", "loss_mask"):
        rows = torch.cat([batch[name] for batch in found])
        for index, row in enumerate(rows):
            assert torch.equal(row, windows[index if index < len(windows) else -1][name])


def test_what_is_fetched_ahead_is_not_done(token_file):
    tokens = token_file(60)
    loader, processed = make_loader(tokens, num_workers=2), 0
    loader.progress = lambda: processed
    batches = iter(loader)
    for _ in range(3):
        next(batches)
        processed += 1
    state = loader.state_dict()
    assert state == {"epoch": 0, "windows": 9}  # the workers are at 12 or more
    resumed = make_loader(tokens, num_workers=2)
    resumed.load_state_dict(state)
    assert firsts(resumed) == firsts(make_loader(tokens))[3:]


def test_iterating_draws_nothing_from_torch(token_file):
    before = torch.get_rng_state()
    firsts(make_loader(token_file(60)))
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(LightningModule):
    """Trains nothing, and keeps the batches that it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["tokens"][:, 0].tolist())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_trainer_gives_every_epoch_its_own_order(token_file):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", enable_checkpointing=False, **quiet)
    recorder = Recorder()
    trainer.fit(recorder, make_loader(token_file(60)))
    assert recorder.seen == epochs_of(make_loader(token_file(60)), 2)
    assert recorder.seen[:9] != recorder.seen[9:]


def test_a_file_without_windows_may_come_first(tmp_path):
    parts = []
    for number, ids in enumerate(([7], [2, 7, 5, 2], [2, 9, 8, 7, 6, 5, 2])):
        path = tmp_path / f"{number}.bin"
        np.array(ids, dtype="<u2").tofile(path)
        parts.append(DocumentWindows(TokenFile(path, "<u2", len(ids)), 3, 3, alone=True))
    assert [len(part) for part in parts] == [0, 1, 2]
    batch = JoinedWindows(parts).__getitems__([-1, 0, 1, 2])
    assert batch["loss_mask"].sum(1).tolist() == [0, 3, 3, 3]  # an end that comes first begins no window of its own
    assert batch["tokens"][1].tolist() == [2, 7, 5]

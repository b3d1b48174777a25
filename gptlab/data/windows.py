"""Sliding windows over tokens, and the order in which training sees them: a pure function of (seed, epoch, position).

Shapes: B batch, T time (block_size).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gptlab.data.tokens import Joined, TokenFile
from gptlab.tokenizer import EOS_ID

ROUNDS = 8  # four are visibly biased for a handful of windows
CHUNK = 4096  # positions permuted at a time: a few microseconds a batch, whatever the corpus
SCAN = 2**24  # tokens looked through at a time for the ends of documents
READ_AHEAD = 2**16  # tokens gathered at a time, as many batches as that is: half a MiB, and a mask


def window_count(tokens: int, block_size: int, stride: int) -> int:
    """Whole windows of block_size tokens, each with a target after it."""
    return max(0, (tokens - block_size - 1) // stride + 1)


class WindowDataset(Dataset):
    """Window i holds the tokens [i * stride, i * stride + T], as T tokens and the T targets one further on.

    With `keep_tail` a last, partial window covers what whole ones leave over, padded and masked; so does window -1,
    which is nothing but padding: together with stride == T every target of the file is scored exactly once.
    """

    def __init__(self, tokens: TokenFile, block_size: int, stride: int, keep_tail: bool = False):
        self.tokens, self.block_size, self.stride, self.keep_tail = tokens, block_size, stride, keep_tail
        self.whole = window_count(len(tokens), block_size, stride)
        covered = (self.whole - 1) * stride + block_size + 1 if self.whole else 1  # the first token is no target
        self.tail_tokens = len(tokens) - covered  # targets in no whole window
        self.dropped_tokens = 0 if keep_tail else self.tail_tokens if self.whole else len(tokens)  # in no window at all

    def __len__(self) -> int:
        return self.whole + (1 if self.keep_tail and self.tail_tokens > 0 else 0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch of these windows: tokens and targets (B, T) int64, loss_mask (B, T) bool."""
        if min(indices) >= 0 and max(indices) < self.whole:  # all but the end of a validation split
            file, step = self.tokens[:], self.stride
            size, shape = file.itemsize, (self.whole, self.block_size + 1)
            found = np.ndarray(shape, file.dtype, file, strides=(step * size, size))[indices]  # a view; these are read
            mask = torch.ones(len(indices), self.block_size, dtype=torch.bool)
        else:
            at = np.asarray(indices)[:, None] * self.stride + np.arange(self.block_size + 1)
            inside = (at < len(self.tokens)) & (np.asarray(indices)[:, None] >= 0)
            found, mask = self.tokens[np.where(inside, at, 0)], torch.from_numpy(inside[:, 1:])
        windows = torch.from_numpy(found.astype(np.int64))
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "loss_mask": mask}


class DocumentWindows(WindowDataset):
    """Windows that begin with a document, after the end token before it, so that all which it tells is seen.

    Each document begins one, and a document of more than T tokens others, every `stride` tokens of it, up to its end.
    What follows a short document in its window is the next ones, the last of them cut off. With `alone` that is masked,
    and so is window -1: together with stride == T every target of the file is scored exactly once.
    """

    def __init__(self, tokens: TokenFile, block_size: int, stride: int, alone: bool = False):
        super().__init__(tokens, block_size, stride)
        ends = [at + np.flatnonzero(tokens[at : at + SCAN] == EOS_ID) for at in range(0, len(tokens) - 1, SCAN)]
        begins = np.concatenate([[0], *ends]).astype(np.int64)
        begins = begins[begins < len(tokens) - 1]  # the last end token begins none
        sizes = np.diff(begins, append=len(tokens) - 1) if len(begins) else begins
        counts = 1 + np.maximum(0, -(-(sizes - block_size) // stride))
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + stride * within
        last = np.repeat(begins + sizes, counts) if alone else starts + block_size  # target of each that is scored
        fits = last < len(tokens)
        self.alone, self.starts, self.last = alone, starts[fits], last[fits]
        self.whole = len(self.starts)
        self.tail_tokens = len(tokens) - 1 - (int(self.last[-1]) if self.whole else 0)
        self.dropped_tokens = self.tail_tokens if self.whole else len(tokens)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        numbers = np.asarray(indices)
        at = self.starts[numbers][:, None] + np.arange(self.block_size + 1)
        inside = (at <= self.last[numbers][:, None]) & (numbers >= 0)[:, None]
        windows = torch.from_numpy(self.tokens[np.where(inside, at, 0)].astype(np.int64))
        mask = torch.from_numpy(inside[:, 1:])
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "loss_mask": mask}


class JoinedWindows(Dataset):
    """The windows of several datasets of one block size, numbered through; none lies across two of them.

    With `says_which` a batch also has `source` (B,): the number of the dataset that each window is of.
    """

    def __init__(self, parts: Sequence[WindowDataset], says_which: bool = False):
        self.parts, self.says_which = list(parts), says_which
        self.block_size = self.parts[0].block_size
        self.starts = np.cumsum([0, *map(len, self.parts)])  # the number of each part's first window, and of them all
        self.dropped_tokens = sum(part.dropped_tokens for part in self.parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """As WindowDataset's; window -1 is nothing but padding here too."""
        numbers = np.asarray(indices)
        owners = np.where(numbers < 0, 0, np.searchsorted(self.starts, numbers, side="right") - 1)
        batch: dict[str, Tensor] = {}
        for owner in np.unique(owners).tolist():
            rows = np.flatnonzero(owners == owner)
            own = np.where(numbers[rows] < 0, -1, numbers[rows] - self.starts[owner])
            found = self.parts[owner].__getitems__(own.tolist())
            if self.says_which:
                found["source"] = torch.full((len(rows),), owner)
            if len(rows) == len(numbers):
                return found
            for name, values in found.items():
                batch.setdefault(name, values.new_empty(len(numbers), *values.shape[1:]))[torch.from_numpy(rows)] = (
                    values
                )
        return batch


def windows_in(tokens: TokenFile | Joined, cut: Callable[[TokenFile], WindowDataset]) -> WindowDataset | JoinedWindows:
    """The windows of one side of the data, whether it is one file or several, each cut by `cut`."""
    parts = [cut(part) for part in tokens.parts]
    return parts[0] if len(parts) == 1 else JoinedWindows(parts)


def report(splits: dict[str, dict[str, Any]], **windows: WindowDataset | JoinedWindows) -> dict[str, dict[str, Any]]:
    """What each side holds, as the rows of a table: sizes, compression, coverage, and windows.

    `splits` is that of meta.json. Training windows start `stride` tokens apart, and what the last one leaves is
    dropped. Validation windows stand side by side, and the last may be shorter: none is dropped.
    """
    rows: dict[str, dict[str, Any]] = {}
    for side, of_side in windows.items():
        split = splits[side]
        rows[side] = {key: split[key] for key in ("bytes", "documents", "tokens", "coverage", "unknown_tokens")}
        rows[side] |= {"bytes_per_token": split["bytes"] / split["tokens"]}
        rows[side] |= {"windows": len(of_side), "dropped_tokens": of_side.dropped_tokens}
    return rows


def permute(positions: np.ndarray, count: int, key: str) -> np.ndarray:
    """Where a shuffle of range(count), chosen by `key`, sends `positions`: a Feistel network with cycle walking.

    It needs no memory for the permutation itself, and gives the same order on any machine and library version.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.blake2b(f"{key}/{count}".encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    values = positions.astype(np.uint64)
    walking = np.ones(len(values), dtype=bool)  # those sent past the end are sent on until they land inside
    while walking.any():
        left, right = values[walking] >> np.uint64(half), values[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        values[walking] = (left << np.uint64(half)) | right
        walking = values >= np.uint64(count)
    return values.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of x reaches every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TrainingOrder(Sampler[list[int]]):
    """Micro-batches of window indices, for one rank.

    Micro-batch k of an epoch is made of the positions [k G, (k + 1) G) of the shuffled windows, G = batch_size * world;
    rank r takes every world-th of them. So the same windows make a step for any number of ranks, workers, or
    accumulated micro-batches. Windows that do not fill a whole optimizer step are left out of the epoch; another epoch
    leaves out others.
    """

    def __init__(self, count: int, batch_size: int, accumulate: int, seed: int, rank: int = 0, world: int = 1):
        self.count, self.seed, self.rank, self.world = count, seed, rank, world
        self.batch_size, self.global_batch = batch_size, batch_size * world
        self.batches = count // (self.global_batch * accumulate) * accumulate
        if not self.batches:
            raise ValueError(
                f"an optimizer step takes {self.global_batch * accumulate} windows and the training split has {count}: "
                "lower data.batch_size, trainer.accumulate_grad_batches, data.stride or model.block_size, or add text"
            )
        self.epoch, self.start = 0, 0

    @property
    def sampler(self) -> "TrainingOrder":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.batches

    def windows_at(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """The numbers of the windows that stand at these places of an epoch, before it is shuffled."""
        return places

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start, self.start = self.epoch, self.start, 0
        chunk, first = np.empty(0, dtype=np.int64), 0  # permuted positions [first, first + len(chunk))
        for batch in range(start, self.batches):
            low, high = batch * self.global_batch, (batch + 1) * self.global_batch
            if high > first + len(chunk):
                positions = np.arange(low, min(max(high, low + CHUNK), self.count))
                places = permute(positions, self.count, f"{self.seed}/{epoch}")
                chunk, first = self.windows_at(places, epoch), low
            yield chunk[low - first : high - first][self.rank :: self.world].tolist()


class ScoringOrder(Sampler[list[int]]):
    """Every window once, in order, in batches of one shape: rank r of the world takes every world-th batch.

    What is missing at the end is filled with window -1, which is all padding.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1):
        self.count, self.batch_size, self.rank, self.world = count, batch_size, rank, world

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            yield [index if index < self.count else -1 for index in range(first, first + self.batch_size)]


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


class WindowLoader(DataLoader):
    """A sized loader whose position is two numbers, the same on every rank, and of a batch that was really trained on.

    `progress` tells how many micro-batches of the epoch are processed: what has been fetched ahead does not count.
    """

    def __init__(
        self,
        dataset: WindowDataset | JoinedWindows,
        order: TrainingOrder | ScoringOrder,
        num_workers: int,
        pin_memory: bool,
    ):
        self.order = order
        self.progress = lambda: 0
        super().__init__(
            dataset,
            batch_sampler=order,
            collate_fn=as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=False,
            generator=torch.Generator(),  # its own, so that starting an iterator draws nothing from torch's
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """As torch's, but that a single process gathers several batches at a time: after a step the loader's code has
        left the processor's caches, and takes ten times as long. So a window may depend on its index alone.
        """
        if self.num_workers or self.pin_memory:
            return super().__iter__()
        return self._read_ahead(max(1, READ_AHEAD // (self.order.batch_size * self.dataset.block_size)))

    def _read_ahead(self, count: int) -> Iterator[dict[str, Tensor]]:
        batches = iter(self.order)
        while ahead := list(islice(batches, count)):
            gathered = self.dataset.__getitems__([index for batch in ahead for index in batch])
            parts = [tensor.split([len(batch) for batch in ahead]) for tensor in gathered.values()]
            for tensors in zip(*parts, strict=True):
                yield dict(zip(gathered, tensors, strict=True))

    def state_dict(self) -> dict[str, Any]:
        assert isinstance(self.order, TrainingOrder)
        return {"epoch": self.order.epoch, "windows": self.progress() * self.order.global_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        order = self.order
        assert isinstance(order, TrainingOrder)
        order.epoch, order.start = state["epoch"], state["windows"] // order.global_batch
        if order.start >= order.batches:
            order.epoch, order.start = order.epoch + 1, 0

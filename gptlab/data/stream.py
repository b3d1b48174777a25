"""Text that is read, tokenized, cut and shuffled while a network trains on it: nothing of it is kept on the disk.

Readers share the files, in another order each turn through them, and join their documents by end-of-text tokens to a
run of tokens without an end. Windows of T + 1 tokens are cut from it, T apart, and shuffled in blocks. Of R readers,
window w of the stream is window w // R of reader w % R. So it does not depend on the number of ranks, and a position is
a number, with the place for each reader where the block of its next window begins.

Shapes: B batch, T time (block_size).
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptlab.data.corpus import Source
from gptlab.data.listed import Copies, TextFile
from gptlab.data.windows import TrainingOrder, permute
from gptlab.tokenizer import EOS_ID, Tokenizer


class Place(NamedTuple):
    """Where a token stands for a reader: `token` in `piece` of the `file`-th that is its own in a `turn`.

    A piece is a document, or one of the parts in which a large one comes; its end-of-text token counts as its last.
    """

    turn: int = 0
    file: int = 0
    piece: int = 0
    token: int = 0


class Block(NamedTuple):
    """Windows that are shuffled among themselves: (buffer, T + 1), with `end`, where the next block begins."""

    number: int
    windows: np.ndarray
    end: Place


@dataclass(frozen=True)
class Text:
    """What is read, and how it is cut and shuffled."""

    files: list[TextFile]
    source: Source  # whose `read` makes documents of a file
    tokenizer: Tokenizer
    block_size: int
    buffer: int  # windows of a block
    readers: int
    seed: int
    cache: Path  # where files that lie elsewhere are copied to, one after another


class Reader:
    """One of the readers of a text, in a thread of its own: blocks of windows, one after another without an end."""

    def __init__(self, text: Text, number: int):
        self.text, self.number = text, number
        self._copies = Copies(text.cache)
        self._closed = Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._under_way: list[Generator[Block, None, None]] = []

    def blocks(self, first: int, place: Place) -> Iterator[Block]:
        """The blocks from number `first` on, which begins at `place`. Each is made while the one before is used."""
        blocks = self._blocks(first, place)
        self._under_way.append(blocks)
        coming = self._pool.submit(next, blocks)
        while True:
            block = coming.result()
            coming = self._pool.submit(next, blocks)
            yield block

    def close(self) -> None:
        """End the reading, and what is copied for it; nobody waits for a whole block or file."""
        self._closed.set()
        self._copies.close()
        self._pool.shutdown(cancel_futures=True)
        for blocks in self._under_way:
            blocks.close()  # and with them the file that they read

    def _blocks(self, first: int, place: Place) -> Generator[Block, None, None]:
        text, span = self.text, self.text.block_size
        dtype = np.dtype("<u2" if text.tokenizer.vocab_size <= 2**16 else "<u4")
        shape, strides = (text.buffer, span + 1), (span * dtype.itemsize, dtype.itemsize)
        pieces = self._pieces(place)
        place, ids = next(pieces)
        for number in count(first):
            tokens, filled = np.empty(text.buffer * span + 1, dtype), 0
            while True:
                taken = ids[: len(tokens) - filled]
                tokens[filled : filled + len(taken)] = taken
                filled += len(taken)
                if filled == len(tokens):
                    break
                place, ids = next(pieces)
            used = len(taken) - 1  # the last token is the first of the next block as well
            place, ids = place._replace(token=place.token + used), ids[used:]
            order = permute(np.arange(text.buffer), text.buffer, f"{text.seed}/{self.number}/{number}")
            yield Block(number, np.ndarray(shape, dtype, tokens, strides=strides)[order], place)

    def _pieces(self, place: Place) -> Iterator[tuple[Place, np.ndarray]]:
        """The ids of each piece of text, without an end, with the place of the first of them."""
        turn, at, skipped, token = place
        encode = self.text.tokenizer.encode
        without: set[TextFile] = set()  # that were read through, with nothing else since
        while True:
            files = self._files(turn)
            following = [*files[1:], self._files(turn + 1)[0]]
            for index in range(at, len(files)):
                pieces = self._read(files[index], skipped, following[index])
                is_empty = skipped == token == 0
                for piece, (content, ends) in enumerate(pieces, skipped):
                    if self._closed.is_set():
                        raise CancelledError
                    ids = np.append(encode(content), EOS_ID) if ends else encode(content)
                    is_empty = is_empty and len(ids) == token
                    yield Place(turn, index, piece, token), ids[token:]
                    token = 0
                skipped = 0
                without = {*without, files[index]} if is_empty else set()
                if len(without) == len(self.text.files):
                    raise ValueError(
                        f"data.files: no text in {len(without)} files; look at data.min_characters and data.field"
                    )
            turn, at = turn + 1, 0

    def _files(self, turn: int) -> list[TextFile]:
        """Those of this reader: every R-th of all, in the order of this turn; of what R leaves over, in turns too."""
        files, readers = self.text.files, self.text.readers
        order = permute(np.arange(len(files)), len(files), f"{self.text.seed}/files/{turn}")
        return [files[i] for i in order[(self.number + turn) % readers :: readers]]

    def _read(self, file: TextFile, skipped: int, following: TextFile) -> Iterator[tuple[str, bool]]:
        """The pieces of a file, each with whether its document ends there, while the following file is fetched."""
        path = self._copies.get(file)
        self._copies.begin(following)
        try:
            with closing(self.text.source.read(path)) as documents:
                yield from ((document.text, document.ends) for document in islice(documents, skipped, None))
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), file.place)) from error
        self._copies.drop(file)


class Ordered:
    """What Lightning asks of a loader whose micro-batches follow from an order: how many, and where to `set_epoch`."""

    order: TrainingOrder

    @property
    def sampler(self) -> TrainingOrder:
        return self.order

    def __len__(self) -> int:
        return len(self.order)


class StreamLoader(Ordered):
    """Batches of a text's windows, for one rank: of micro-batch k, which has G = B * world, every world-th window.

    It is sized: an epoch is as many micro-batches as `order` says. `progress` tells how many of them are processed, and
    the state is that of the last of these, the same on every rank: what has been read ahead does not count. To go on,
    each reader begins the block again in which its next window stands.
    """

    def __init__(self, text: Text, order: TrainingOrder, pin_memory: bool):
        self.text, self.order, self.pin_memory = text, order, pin_memory
        self.progress: Callable[[], int] = lambda: 0
        # Blocks that one batch and the next may need; Lightning processes one while none or one more is fetched.
        self.kept = 2 + -(-4 * order.global_batch // (text.readers * text.buffer))
        own = sorted({(rank * order.world + order.rank) % text.readers for rank in range(text.readers)})
        self.readers = {number: Reader(text, number) for number in own}
        self._starts: dict[int, dict[int, Place]] = {number: {0: Place()} for number in own}
        self._blocks: dict[int, Iterator[Block]] = {}
        self._block: dict[int, Block] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = self.order
        epoch, start, order.start = order.epoch, order.start, 0
        for batch in range(start, len(order)):
            first = (epoch * len(order) + batch) * order.global_batch
            yield self._batch(np.arange(first + order.rank, first + order.global_batch, order.world))

    def _batch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """The windows of these numbers: tokens and targets (B, T) int64, loss_mask (B, T) bool."""
        windows = np.empty((len(numbers), self.text.block_size + 1), dtype=np.int64)
        owners, own = numbers % self.text.readers, numbers // self.text.readers
        for row, (reader, number) in enumerate(zip(owners.tolist(), own.tolist(), strict=True)):
            windows[row] = self._block_of(reader, number // self.text.buffer).windows[number % self.text.buffer]
        found = torch.from_numpy(windows)
        mask = torch.ones(len(numbers), self.text.block_size, dtype=torch.bool)
        batch = {"tokens": found[:, :-1], "targets": found[:, 1:], "loss_mask": mask}
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch

    def _block_of(self, reader: int, number: int) -> Block:
        """A block of a reader, which reads on until it comes to that; it begins again only for an earlier one."""
        block = self._block.get(reader)
        starts = self._starts[reader]
        if block is None or number < block.number:
            first = max(start for start in starts if start <= number)
            self._blocks[reader] = self.readers[reader].blocks(first, starts[first])
        while block is None or block.number != number:
            block = self._block[reader] = next(self._blocks[reader])
            starts[block.number + 1] = block.end
            for old in [start for start in starts if 0 < start <= block.number - self.kept]:
                del starts[old]
        return block

    def state_dict(self) -> dict[str, Any]:
        done = self.progress() * self.order.global_batch
        first = self.order.epoch * len(self.order) * self.order.global_batch + done
        places = {}
        for reader, starts in self._starts.items():
            number = -(-(first - reader) // self.text.readers) // self.text.buffer
            places[reader] = [number, *starts[number]]
        if self.order.world > 1 and self.text.readers > 1:  # each rank knows of its own readers
            known: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(known, places)
            places = {reader: place for part in known for reader, place in part.items()}
        return {"epoch": self.order.epoch, "windows": done, "places": [places[r] for r in range(self.text.readers)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        order = self.order
        order.epoch, order.start = state["epoch"], state["windows"] // order.global_batch
        if order.start >= len(order):
            order.epoch, order.start = order.epoch + 1, 0
        for reader in self._starts:
            number, *place = state["places"][reader]
            self._starts[reader] = {0: Place(), number: Place(*place)}

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()

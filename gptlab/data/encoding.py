"""Documents become two files of token ids, on all processors, in bounded memory; a build that was killed goes on.

The text is read in this process, in batches whose limits depend on the text alone. Each batch is encoded here or by a
process of its own, and written in order: so the bytes do not depend on how many processes there were, or on how often
they were killed.
"""

import hashlib
import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from gptlab.data.document import Document
from gptlab.run import write_json
from gptlab.tokenizer import EOS_ID, UNK_ID, Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

BATCH_CHARACTERS = 2**19  # a tenth of a second for sentencepiece
WORTH_PROCESSES = 3 * 10**7  # bytes of text: below, they take longer to start than they save
JOURNAL = "progress.json"  # how far a build has come, for the one that follows when it is killed
JOURNAL_SECONDS = 5.0
LOG_SECONDS = 30.0
SIDES = ("train", "validation")
SUMS = ("tokens", "unknown_tokens", "documents", "bytes")

Batch = list[tuple[str, str, bool]]  # side, text, and whether its document ends there


@dataclass
class Encoded:
    """One side of a batch: the bytes of its ids, and what they are of. `characters` are code points and how many."""

    content: bytes = b""
    tokens: int = 0
    unknown_tokens: int = 0
    documents: int = 0
    bytes: int = 0
    characters: list[tuple[int, int]] = field(default_factory=list)

    def sums(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "content"}


def batches(pieces: Iterable[tuple[str, Document]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for side, document in pieces:
        batch.append((side, document.text, document.ends))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer: Tokenizer, dtype: str, batch: Batch) -> dict[str, Encoded]:
    sides: dict[str, Encoded] = {}
    for side in {side for side, _, _ in batch}:
        own = [(text, ends) for other, text, ends in batch if other == side]
        ids = [part for text, ends in own for part in (tokenizer.encode(text), [EOS_ID] if ends else [])]
        joined = np.concatenate([np.asarray(part, dtype=np.int64) for part in ids])
        assert joined.size == 0 or (joined.min() >= 0 and joined.max() < tokenizer.vocab_size)
        text = "".join(text for text, _ in own)
        counts = np.bincount(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32))
        found = np.flatnonzero(counts)
        sides[side] = Encoded(
            content=joined.astype(dtype).tobytes(),
            tokens=joined.size,
            unknown_tokens=int(np.count_nonzero(joined == UNK_ID)),
            documents=sum(ends for _, ends in own),
            bytes=len(text.encode("utf-8", "surrogatepass")),
            characters=list(zip(found.tolist(), counts[found].tolist(), strict=True)),
        )
    return sides


def encode(
    folder: Path,
    pieces: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    dtype: str,
    *,
    workers: int,
    trust: tuple[str, ...],
    progress: "Progress",
) -> dict[str, dict[str, Any]]:
    """Write `train.bin` and `validation.bin` into `folder`, and say what they hold.

    `workers` processes encode, none but this one where it is 0. A folder in which this was killed is gone on with.
    """
    with ExitStack() as stack:
        writers = {side: _Writer(folder / f"{side}.bin") for side in SIDES}
        done = _restore(folder, writers)
        for writer in writers.values():
            stack.callback(writer.file.close)
        todo = batches(pieces)
        for batch in islice(todo, done):
            progress.passed(batch)
        pool = stack.enter_context(_Workers(folder, tokenizer, dtype, workers, trust))
        saved = time.monotonic()
        for batch, sides in pool.encoded(todo):
            for side, encoded in sides.items():
                writers[side].add(encoded)
            done += 1
            progress.passed(batch)
            if time.monotonic() - saved > JOURNAL_SECONDS:
                _save(folder, writers, done)
                saved = time.monotonic()
        for writer in writers.values():
            writer.sync()
        (folder / JOURNAL).unlink(missing_ok=True)
        return {side: writer.report(tokenizer) for side, writer in writers.items()}


class _Writer:
    """One file of ids, with the hash of its bytes and the sums over what was added."""

    def __init__(self, path: Path):
        self.path = path
        self.file: BinaryIO = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115  closed by its owner
        self.forget()

    def forget(self) -> None:
        self.digest = hashlib.sha256()
        self.sums = dict.fromkeys(SUMS, 0)
        self.characters: Counter[int] = Counter()

    def add(self, encoded: Encoded) -> None:
        self.file.write(encoded.content)
        self.digest.update(encoded.content)
        self.sums = {name: value + getattr(encoded, name) for name, value in self.sums.items()}
        self.characters.update(dict(encoded.characters))

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def cut(self, size: int) -> None:
        self.file.truncate(size)
        self.file.seek(size)

    def entry(self) -> dict[str, Any]:
        """What a journal says of it."""
        known = {"size": self.file.tell(), "sha256": self.digest.hexdigest(), "sums": self.sums}
        return known | {"characters": sorted(self.characters.items())}

    def restore(self, entry: dict[str, Any]) -> bool:
        """Take up what `entry` tells of; False where the file does not hold it."""
        left, size = entry["size"], entry["size"]
        self.file.seek(0)
        while left and (block := self.file.read(min(left, 2**20))):
            self.digest.update(block)
            left -= len(block)
        if left or self.digest.hexdigest() != entry["sha256"]:
            return False
        self.sums, self.characters = entry["sums"], Counter(dict(entry["characters"]))
        self.cut(size)
        return True

    def report(self, tokenizer: Tokenizer) -> dict[str, Any]:
        found = {chr(code): count for code, count in sorted(self.characters.items())}
        return self.sums | {"sha256": self.digest.hexdigest(), "coverage": tokenizer.coverage(found)}


def _save(folder: Path, writers: dict[str, _Writer], done: int) -> None:
    for writer in writers.values():
        writer.sync()
    sides = {side: writer.entry() for side, writer in writers.items()}
    write_json(folder / JOURNAL, {"batch_characters": BATCH_CHARACTERS, "batches": done, "sides": sides})


def _restore(folder: Path, writers: dict[str, _Writer]) -> int:
    """How many batches the files hold, by a journal that they agree with; what follows is cut off. 0 without one."""
    try:
        journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        if journal["batch_characters"] == BATCH_CHARACTERS and all(
            writer.restore(journal["sides"][side]) for side, writer in writers.items()
        ):
            log.info("going on with tokens that were begun: %s", folder)
            return journal["batches"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for writer in writers.values():
        writer.forget()
        writer.cut(0)
    return 0


def can_go_on(folder: Path) -> bool:
    """Whether a build in this folder was killed after it wrote down how far it had come."""
    return (folder / JOURNAL).is_file()


class Progress:
    """How far encoding has come: a bar on a terminal, else a line every half a minute.

    `position()` is how much of `total` bytes, as they lie on the disk, was read; 0 where that is not known.
    """

    def __init__(self, total: int, position: Callable[[], int]):
        self.total, self.position = total, position
        self.bytes = self.seen = 0
        self.start = self.said = time.monotonic()
        self.bar = tqdm(
            total=total or None,
            unit="B",
            unit_scale=True,
            desc="tokens",
            disable=not sys.stderr.isatty(),
            delay=1,  # nothing for a text that takes less
            leave=False,
        )

    def passed(self, batch: Batch) -> None:
        self.bytes += sum(len(text.encode("utf-8", "surrogatepass")) for _, text, _ in batch)
        at = min(self.position() or self.bytes, self.total or self.bytes)
        seconds = max(time.monotonic() - self.start, 1e-9)
        self.bar.set_postfix_str(f"{self.bytes / 1e6 / seconds:.1f} MB/s of text", refresh=False)
        self.bar.update(at - self.seen)
        self.seen = at
        if self.bar.disable and time.monotonic() - self.said > LOG_SECONDS:
            self.said = time.monotonic()
            left = seconds * (self.total / at - 1) if self.total and at else None
            log.info(
                "tokens of %.0f MB of text, %.1f MB/s%s",
                self.bytes / 1e6,
                self.bytes / 1e6 / seconds,
                "" if left is None else f", {left / 60:.0f} min left",
            )

    def close(self) -> None:
        self.bar.close()


def processes(asked: int | None, text_bytes: int) -> int:
    """How many to encode with: `asked`, or one for each processor where there is text enough; 0 is this one alone."""
    if asked is not None:
        return asked
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return there if there > 1 and text_bytes >= WORTH_PROCESSES else 0


class _Workers:
    """Processes that encode batches, each spoken to by a thread; they end when this one does, however it ends."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: str, count: int, trust: tuple[str, ...]):
        self.tokenizer, self.dtype, self.count = tokenizer, dtype, count
        self.command = [sys.executable, "-m", "gptlab.data.encoding", str(folder / "tokenizer"), dtype, *trust]
        self.free: deque[subprocess.Popen] = deque()
        self.threads = ThreadPoolExecutor(count) if count else None

    def __enter__(self) -> "_Workers":
        path = os.pathsep.join(part for part in sys.path if part)
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        for _ in range(self.count):
            self.free.append(subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env))
        self.all = list(self.free)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for worker in self.all:
            if kind is not None:
                worker.kill()
            with suppress(BrokenPipeError):  # it has ended by itself
                worker.stdin.close()
        if self.threads:
            self.threads.shutdown(cancel_futures=True)
        for worker in self.all:
            worker.wait()
            worker.stdout.close()

    def encoded(self, todo: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Encoded]]]:
        """Each batch with what it was encoded to, in order; twice as many as there are processes are under way."""
        if not self.threads:
            yield from ((batch, encode_batch(self.tokenizer, self.dtype, batch)) for batch in todo)
            return
        under_way: deque[tuple[Batch, Future]] = deque()
        for batch in todo:
            under_way.append((batch, self.threads.submit(self._ask, batch)))
            if len(under_way) >= 2 * self.count + 1:
                batch, future = under_way.popleft()
                yield batch, future.result()
        yield from ((batch, future.result()) for batch, future in under_way)

    def _ask(self, batch: Batch) -> dict[str, Encoded]:
        worker = self.free.popleft()
        try:
            _send(worker.stdin, batch)
            answer, content = _receive(worker.stdout)
        except (BrokenPipeError, EOFError) as error:
            raise RuntimeError(
                f"a process that encodes text has ended with exit code {worker.wait()}, for want of memory perhaps: "
                "start again, it goes on where it was; data.prepare_workers=0 needs no such process"
            ) from error
        finally:
            self.free.append(worker)
        if isinstance(answer, str):
            raise ValueError(answer)
        ends = np.cumsum([size for _, size, _ in answer])
        return {
            side: Encoded(content[end - size : end], **sums)
            for (side, size, sums), end in zip(answer, ends, strict=True)
        }


def _send(file: Any, head: object, content: bytes = b"") -> None:
    """A message between a process and its own child: JSON, and bytes after it."""
    text = json.dumps(head).encode()
    file.write(struct.pack("<QQ", len(text), len(content)) + text + content)
    file.flush()


def _receive(file: Any) -> tuple[Any, bytes]:
    sizes = file.read(16)
    if len(sizes) < 16:
        raise EOFError
    text, content = (file.read(size) for size in struct.unpack("<QQ", sizes))
    return json.loads(text), content


@contextmanager
def _stdout_kept() -> Iterator[BinaryIO]:
    """Standard output for messages alone: what code prints meanwhile goes to standard error."""
    with os.fdopen(os.dup(1), "wb") as messages:
        os.dup2(2, 1)
        yield messages


def work(tokenizer_folder: str, dtype: str, *trust: str) -> None:
    """What a process does that encodes for another: answer each batch on standard input, until there are no more."""
    tokenizer = load_tokenizer(tokenizer_folder, trust)
    with _stdout_kept() as messages:
        while True:
            try:
                batch, _ = _receive(sys.stdin.buffer)
            except EOFError:
                return
            try:
                sides = encode_batch(tokenizer, dtype, batch)
                head = [(side, len(encoded.content), encoded.sums()) for side, encoded in sides.items()]
                _send(messages, head, b"".join(encoded.content for encoded in sides.values()))
            except ValueError as error:
                _send(messages, str(error))


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked hears of it, and closes the pipe
    work(*sys.argv[1:])

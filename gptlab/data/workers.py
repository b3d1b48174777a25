"""Processes that turn batches of text into ids: each has a pipe, and ends when that is closed, however that comes.

They import no more than the tokenizer does. Messages are JSON, and bytes after it.
"""

import json
import os
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from gptlab.data.batches import Batch, Encoded, encode_batch
from gptlab.tokenizer import Tokenizer, load_tokenizer

WORTH_PROCESSES = 3 * 10**7  # bytes of text: below, they take longer to start than they save


def processes(asked: int | None, text_bytes: int) -> int:
    """How many to encode with: `asked`, or one for each processor where there is text enough; 0 is this one alone."""
    if asked is not None:
        return asked
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return there if there > 1 and text_bytes >= WORTH_PROCESSES else 0


class Workers:
    """Processes that encode batches, each spoken to by a thread; they end when this one does, however it ends."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: str, count: int, trust: tuple[str, ...]):
        self.tokenizer, self.dtype, self.count = tokenizer, dtype, count
        self.command = [sys.executable, "-m", "gptlab.data.workers", str(folder / "tokenizer"), dtype, *trust]
        self.free: deque[subprocess.Popen] = deque()
        self.threads = ThreadPoolExecutor(count) if count else None

    def __enter__(self) -> "Workers":
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
            texts = [text.encode("utf-8", "surrogatepass") for _, text, _ in batch]
            head = [(side, len(text), ends) for (side, _, ends), text in zip(batch, texts, strict=True)]
            _send(worker.stdin, head, b"".join(texts))
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
        sides, start = {}, 0
        for side, size, sums in answer:
            sides[side] = Encoded(content[start : start + size], **sums)
            start += size
        return sides


def _send(file: Any, head: object, content: bytes = b"") -> None:
    """A message between a process and its own child: JSON, and bytes after it."""
    text = json.dumps(head).encode()
    file.write(struct.pack("<QQ", len(text), len(content)) + text + content)
    file.flush()


def _receive(file: Any) -> tuple[Any, bytes]:
    """The next message. Raises EOFError where the other side has ended, be it in the middle of one."""
    text_size, content_size = struct.unpack("<QQ", _exactly(file, 16))
    return json.loads(_exactly(file, text_size)), _exactly(file, content_size)


def _exactly(file: Any, size: int) -> bytes:
    if len(found := file.read(size)) < size:
        raise EOFError
    return found


@contextmanager
def _stdout_kept() -> Iterator[BinaryIO]:
    """Standard output for messages alone: what code prints meanwhile goes to standard error."""
    with os.fdopen(os.dup(1), "wb") as messages:
        os.dup2(2, 1)
        yield messages


def work(tokenizer_folder: str, dtype: str, *trust: str) -> None:
    """What a process does that encodes for another: answer each batch on standard input, until there are no more."""
    tokenizer = load_tokenizer(tokenizer_folder, trust)
    with suppress(EOFError, BrokenPipeError), _stdout_kept() as messages:  # the one who asked has ended
        while True:
            head, content = _receive(sys.stdin.buffer)
            ends_at = list(accumulate((size for _, size, _ in head), initial=0))
            texts = (content[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(ends_at))
            batch = [(side, text, ends) for (side, _, ends), text in zip(head, texts, strict=True)]
            try:
                sides = encode_batch(tokenizer, dtype, batch)
            except ValueError as error:
                _send(messages, str(error))
                continue
            head = [(side, len(encoded.content), encoded.sums()) for side, encoded in sides.items()]
            _send(messages, head, b"".join(encoded.content for encoded in sides.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked hears of it, and closes the pipe
    work(*sys.argv[1:])

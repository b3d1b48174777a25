"""Documents become two files of token ids, on all processors, in bounded memory; a build that was killed goes on.

The text is read in this process, in batches whose limits depend on the text alone. Each batch is encoded here or by a
process of its own, and written in order: so the bytes do not depend on how many processes there were, or on how often
they were killed.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from gptlab.data import batches
from gptlab.data.batches import Batch, Encoded
from gptlab.data.document import Document
from gptlab.data.workers import Workers
from gptlab.run import write_json
from gptlab.tokenizer import Tokenizer

log = logging.getLogger(__name__)

JOURNAL = "progress.json"  # how far a build has come, for the one that follows when it is killed
JOURNAL_SECONDS = 5.0
LOG_SECONDS = 30.0
SIDES = ("train", "validation")
SUMS = ("tokens", "unknown_tokens", "documents", "bytes")


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
        todo = batches.of(pieces)
        for batch in islice(todo, done):
            progress.passed(batch)
        pool = stack.enter_context(Workers(folder, tokenizer, dtype, workers, trust))
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
        return {side: writer.report(tokenizer) for side, writer in writers.items()}


class _Writer:
    """One file of ids, with the hash of its bytes and the sums over what was added."""

    def __init__(self, path: Path):
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
    write_json(folder / JOURNAL, {"batch_characters": batches.BATCH_CHARACTERS, "batches": done, "sides": sides})


def _restore(folder: Path, writers: dict[str, _Writer]) -> int:
    """How many batches the files hold, by a journal that they agree with; what follows is cut off. 0 without one."""
    if can_go_on(folder):
        try:
            journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            if journal["batch_characters"] == batches.BATCH_CHARACTERS and all(
                writer.restore(journal["sides"][side]) for side, writer in writers.items()
            ):
                log.info("going on with tokens that were begun: %s", folder)
                return journal["batches"]
            log.warning("beginning anew, since the tokens are not those of their journal: %s", folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("beginning anew, since %s cannot be read (%r)", folder / JOURNAL, error)
    for writer in writers.values():
        writer.forget()
        writer.cut(0)
    return 0


def finish(folder: Path) -> None:
    """Forget how far the build had come: it is over, and what it made is accounted for."""
    (folder / JOURNAL).unlink(missing_ok=True)


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

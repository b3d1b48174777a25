"""Shards: the files of a text that is too large to be hashed or kept here, known by name, size and date."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from gptlab.data.corpus import Files, Source
from gptlab.data.document import Document
from gptlab.data.remote import copy, is_remote, listed, name_of
from gptlab.data.windows import permute
from gptlab.files import sha256_of_file

SAMPLED_SHARDS = 16  # from which a tokenizer's sample is read, in equal parts


@dataclass(frozen=True)
class Shard:
    """A file by its path or URL. `version` is its date, or what else tells one content of it from the next."""

    place: str
    size: int
    version: str

    @property
    def identity(self) -> list:
        """The same wherever the file lies."""
        return [name_of(self.place), self.size, self.version]


def shards_of(files: str | Sequence[str]) -> list[Shard]:
    """The shards that paths, globs and URLs name, none of them read. Raises ValueError where one is not there."""
    patterns = [files] if isinstance(files, str) else [str(pattern) for pattern in files]
    found: dict[str, Shard] = {}
    for pattern in patterns or Files([]).paths():  # which says that there is none
        there = map(_local, Files(pattern).paths()) if not is_remote(pattern) else starmap(Shard, listed(pattern))
        for shard in there:
            if shard.place in found:
                raise ValueError(f"data.files: {shard.place} is named twice; its text would count double: keep one")
            found[shard.place] = shard
    return list(found.values())


def _local(path: Path) -> Shard:
    facts = path.stat()
    return Shard(str(path.resolve()), facts.st_size, f"mtime {facts.st_mtime_ns}")


def fingerprint_of(shards: Iterable[Shard]) -> str:
    """Equal for the same files in the same order, wherever they lie, as far as name, size and date can tell."""
    return hashlib.sha256(repr([shard.identity for shard in shards]).encode()).hexdigest()


def refuse_overlap(shards: Iterable[Shard], held_out: Iterable[Path]) -> None:
    """Raise ValueError where a held-out file is a shard too, or has all the bytes of one that lies here."""
    by_size: dict[int, list[Shard]] = {}
    for shard in shards:
        by_size.setdefault(shard.size, []).append(shard)
    for path in held_out:
        for shard in by_size.get(path.stat().st_size, []):
            if is_remote(shard.place):
                continue
            if str(path.resolve()) == shard.place or sha256_of_file(path) == sha256_of_file(Path(shard.place)):
                raise ValueError(
                    f"{path} is validation text, and the same as {shard.place}, which is training text: leave it out "
                    "of one of them"
                )


class Copies:
    """Shards as local files, one after another. What lies elsewhere is copied, and removed when it has been read.

    What a process that was killed has left is removed by the next one. One reader uses this, and its own thread.
    """

    def __init__(self, cache: Path):
        self.root = Path(cache) / "shards"
        self._folder: Path | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy")
        self._under_way: dict[Shard, Future[Path]] = {}
        self._closed = Event()

    def begin(self, shard: Shard) -> None:
        """Start copying a shard that will be needed, while another one is read."""
        if is_remote(shard.place) and shard not in self._under_way:
            self._under_way[shard] = self._pool.submit(self._copied, shard)

    def get(self, shard: Shard) -> Path:
        """The shard's file, which is here. Raises ValueError where it is not the one that it was."""
        if is_remote(shard.place):
            self.begin(shard)
            return self._under_way[shard].result()
        path = Path(shard.place)
        now = _local(path) if path.is_file() else None
        if now != shard:
            raise ValueError(
                f"{path} was {shard.size} bytes of {shard.version} when the run began, and now is "
                f"{'not there' if now is None else f'{now.size} bytes of {now.version}'}: put it back as it was"
            )
        return path

    def drop(self, shard: Shard) -> None:
        """Remove the copy of a shard that has been read."""
        if (copied := self._under_way.pop(shard, None)) is not None:
            copied.result().unlink()

    def _copied(self, shard: Shard) -> Path:
        folder = self._folder = self._folder or self._new_folder()
        own = hashlib.sha256(shard.place.encode()).hexdigest()[:16]
        target = folder / f"{own}-{name_of(shard.place)}"  # the end of the name says how it is to be read
        copy(shard.place, target, self._closed.is_set)
        return target

    def _new_folder(self) -> Path:
        """A folder that is locked as long as this process lives; those that are no longer locked are removed."""
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "guard"):
            for path in self.root.glob("*.lock"):
                with suppress(Timeout), FileLock(path, timeout=0):
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink()
            folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self.root))
            self._lock = FileLock(folder.with_suffix(".lock"), thread_local=False)
            self._lock.acquire()
        return folder

    def close(self) -> None:
        """Stop copying, and remove all copies."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.release()
            self._folder = None


class Nothing(Source):
    """No text: all that is prepared of one that is read only while training."""

    def paths(self) -> list[Path]:
        return []

    def read(self, path: Path) -> Iterator[Document]:
        return iter(())


class Sample(Source):
    """The beginnings of some shards, `max_bytes` in all, from which a tokenizer learns; nothing else is read."""

    def __init__(self, files: Any, source: Source, max_bytes: int, cache: Path):
        self.files, self.source, self.max_bytes, self.cache = files, source, max_bytes, cache

    @cached_property
    def shards(self) -> list[Shard]:
        return shards_of(self.files)

    def paths(self) -> list[Path]:
        return []

    def read(self, path: Path) -> Iterator[Document]:
        return self.source.read(path)

    def documents(self) -> Iterator[Document]:
        """Of shards drawn by lot, an equal part of each; what one has too little of, the others may give."""
        drawn = [self.shards[i] for i in permute(np.arange(len(self.shards)), len(self.shards), "sample")]
        drawn, left = drawn[:SAMPLED_SHARDS], self.max_bytes
        copies = Copies(self.cache)
        try:
            for index, shard in enumerate(drawn):
                until = left - left // (len(drawn) - index)
                for document in self.read(copies.get(shard)):
                    yield document
                    left -= len(document.text.encode("utf-8", "surrogatepass"))
                    if left <= until:
                        break
                copies.drop(shard)
        finally:
            copies.close()

    @property
    def kinds(self) -> list[type]:
        return [Sample, *self.source.kinds]

    @property
    def settings(self) -> dict:
        return {"shards": fingerprint_of(self.shards), "bytes": self.max_bytes, "source": self.source.settings}

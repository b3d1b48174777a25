"""The files of a text that is too large to be hashed or kept here, known by name, size and date."""

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

SAMPLED_FILES = 16  # from which a tokenizer's sample is read, in equal parts


@dataclass(frozen=True)
class TextFile:
    """A file by its path or URL. `version` is its date, or what else tells one content of it from the next."""

    place: str
    size: int
    version: str

    @property
    def identity(self) -> list:
        """The same wherever the file lies."""
        return [name_of(self.place), self.size, self.version]


def text_files(files: str | Sequence[str], key: str = "data.files") -> list[TextFile]:
    """The files that paths, globs and URLs name, none read. Raises ValueError, naming `key`, where one is not there."""
    patterns = [files] if isinstance(files, str) else [str(pattern) for pattern in files]
    found: dict[str, TextFile] = {}
    for pattern in patterns or Files([], key=key).paths():  # which says that there is none
        if is_remote(pattern):
            there = starmap(TextFile, listed(pattern, key))
        else:
            there = map(_local, Files(pattern, key=key).paths())
        for file in there:
            place = file.place if is_remote(file.place) else str(Path(file.place).resolve())
            if place in found:
                raise ValueError(f"{key}: {file.place} is named twice; its text would count double: keep one")
            found[place] = file
    return list(found.values())


def _local(path: Path) -> TextFile:
    facts = path.stat()
    return TextFile(str(path.parent.resolve() / path.name), facts.st_size, f"mtime {facts.st_mtime_ns}")


def fingerprint_of(files: Iterable[TextFile]) -> str:
    """Equal for the same files in the same order, wherever they lie, as far as name, size and date can tell."""
    return hashlib.sha256(repr([file.identity for file in files]).encode()).hexdigest()


def refuse_overlap(files: Iterable[TextFile], patterns: str | Sequence[str], held_out: Iterable[Path]) -> None:
    """Raise ValueError where a held-out file is among them, or has all the bytes of one that lies here.

    `patterns` are those of `held_out`: of files from elsewhere the place is compared, and name, size and version.
    """
    by_size: dict[int, list[TextFile]] = {}
    known: dict[object, TextFile] = {}
    for file in files:
        by_size.setdefault(file.size, []).append(file)
        if is_remote(file.place):
            known |= {file.place: file, tuple(file.identity): file}
    remote = [pattern for pattern in ([patterns] if isinstance(patterns, str) else patterns) if is_remote(str(pattern))]
    for file in text_files(remote, "data.validation_files") if remote and known else ():
        if same := known.get(file.place) or known.get(tuple(file.identity)):
            raise ValueError(
                f"{file.place} is validation text, and the same as {same.place}, which is training text: leave it out "
                "of one of them"
            )
    for path in held_out:
        for file in by_size.get(path.stat().st_size, []):
            if is_remote(file.place):
                continue
            if path.samefile(file.place) or sha256_of_file(path) == sha256_of_file(Path(file.place)):
                raise ValueError(
                    f"{path} is validation text, and the same as {file.place}, which is training text: leave it out "
                    "of one of them"
                )


class Copies:
    """Files, one after another, as paths here. What lies elsewhere is copied, and removed when it has been read.

    What a process that was killed has left is removed by the next one. One reader uses this, and its own thread.
    """

    def __init__(self, cache: Path):
        self.root = Path(cache) / "copies"
        self._folder: Path | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy")
        self._under_way: dict[TextFile, Future[Path]] = {}
        self._closed = Event()

    def begin(self, file: TextFile) -> None:
        """Start copying a file that will be needed, while another one is read."""
        if is_remote(file.place) and file not in self._under_way:
            self._under_way[file] = self._pool.submit(self._copied, file)

    def get(self, file: TextFile) -> Path:
        """The path of a file here. Raises ValueError where its content is not what it was."""
        if is_remote(file.place):
            self.begin(file)
            return self._under_way[file].result()
        path = Path(file.place)
        now = _local(path) if path.is_file() else None
        if now != file:
            raise ValueError(
                f"{path} was {file.size} bytes of {file.version} when the run began, and now is "
                f"{'not there' if now is None else f'{now.size} bytes of {now.version}'}: put it back as it was"
            )
        return path

    def drop(self, file: TextFile) -> None:
        """Remove the copy of a file that has been read."""
        if (copied := self._under_way.pop(file, None)) is not None:
            copied.result().unlink()

    def _copied(self, file: TextFile) -> Path:
        folder = self._folder = self._folder or self._new_folder()
        own = hashlib.sha256(file.place.encode()).hexdigest()[:16]
        target = folder / f"{own}-{name_of(file.place)}"  # the end of the name says how it is to be read
        copy(file.place, target, self._closed.is_set)
        if (size := target.stat().st_size) != file.size and file.size:  # 0: its place does not tell
            raise ValueError(f"{file.place} had {file.size} bytes when the run began, and now has {size}: put it back")
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
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()
            self._folder = None


class Nothing(Source):
    """No text: all that is prepared of one that is read only while training."""

    def paths(self) -> list[Path]:
        return []

    def read(self, path: Path) -> Iterator[Document]:
        return iter(())


class Sample(Source):
    """The beginnings of some files, `max_bytes` in all, from which a tokenizer learns; nothing else is read."""

    def __init__(self, patterns: Any, source: Source, max_bytes: int, cache: Path):
        self.patterns, self.source, self.max_bytes, self.cache = patterns, source, max_bytes, cache

    @cached_property
    def files(self) -> list[TextFile]:
        return text_files(self.patterns)

    def paths(self) -> list[Path]:
        return []

    def read(self, path: Path) -> Iterator[Document]:
        return self.source.read(path)

    def documents(self) -> Iterator[Document]:
        """Of files drawn by lot, an equal part of each; what one has too little of, the others may give."""
        drawn = [self.files[i] for i in permute(np.arange(len(self.files)), len(self.files), "sample")]
        drawn, left = drawn[:SAMPLED_FILES], self.max_bytes
        copies = Copies(self.cache)
        try:
            for index, file in enumerate(drawn):
                until = left - left // (len(drawn) - index)
                for document in self.read(copies.get(file)):
                    yield document
                    left -= len(document.text.encode("utf-8", "surrogatepass"))
                    if left <= until:
                        break
                copies.drop(file)
        finally:
            copies.close()

    @property
    def kinds(self) -> list[type]:
        return [Sample, *self.source.kinds]

    @property
    def settings(self) -> dict:
        return {"files": fingerprint_of(self.files), "bytes": self.max_bytes, "source": self.source.settings}

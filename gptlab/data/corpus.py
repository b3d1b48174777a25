"""Text in: files become documents, and these become training and validation text, before any windows are cut."""

import glob
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from gptlab.data.document import Document
from gptlab.data.formats import Reading, read_documents
from gptlab.data.grammar import Optimum
from gptlab.data.opening import opened
from gptlab.data.remote import is_remote, local_copies

MANY_DOCUMENTS = 100  # from here on whole documents go to one side; below, each one gives its tail to validation


class Source(ABC):
    """Where text comes from. It can be read many times, and gives the same documents in the same order each time."""

    bytes_read = 0  # of the files, as they lie on the disk; for a progress bar
    optimum: Callable[[str], Optimum] | None = None  # of a document, where its probability is known: see Stories

    @abstractmethod
    def paths(self) -> list[Path]:
        """The input files, which exist: downloaded first where needed."""

    @abstractmethod
    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one of `paths()`."""

    def documents(self) -> Iterator[Document]:
        for path in self.paths():
            yield from self.read(path)

    def _count(self, size: int) -> None:
        self.bytes_read += size

    @property
    def kinds(self) -> list[type]:
        """The classes whose modules make the documents: with an edit in one of them, a cache is stale."""
        return [type(self), Reading, opened, Document]

    @property
    def settings(self) -> dict:
        """What else changes the documents, in plain types: with the files' bytes, it tells when a cache is stale."""
        return {}

    def named(self, path: Path) -> list[str]:
        """What the name of one of `paths()` says of how it is read: the same bytes may become other documents."""
        return []


class Files(Source):
    """Files of text or rows. `files` is a path, glob or URL, or a list of them; `**` means any depth.

    `reading` tells how they become documents. `key` is the one that names them, for errors to say.
    """

    def __init__(self, files: str | Sequence[str], reading: Reading | None = None, key: str = "data.files"):
        self.key = key
        self.files = [files] if isinstance(files, str) else [str(pattern) for pattern in files]
        self.reading = reading or Reading()
        self._copies: dict[str, list[Path]] = {}  # of what lies elsewhere: asked for once a run

    def paths(self) -> list[Path]:
        if not self.files:
            raise ValueError(f"{self.key} is empty; name a file or a glob such as 'texts/**/*.txt'")
        found: list[Path] = []  # with the names that were given: a link's own name says how it is read
        given: dict[Path, str] = {}  # resolved path -> the pattern that gave it
        for pattern in self.files:
            for path in self._expand(pattern):
                if not str(path).isprintable() and any("\udc80" <= c <= "\udcff" for c in str(path)):
                    raise ValueError(f"{self.key}: the name of {str(path)!r} is not UTF-8; rename the file")
                if (place := path.resolve()) in given:
                    raise ValueError(
                        f"{self.key}: {path} is named twice, by {given[place]!r} and {pattern!r}; "
                        "its text would count double: keep one of them"
                    )
                given[place] = pattern
                found.append(path.parent.resolve() / path.name)
        return found

    def read(self, path: Path) -> Iterator[Document]:
        yield from read_documents(path, self.reading, self._count)

    def _expand(self, pattern: str) -> list[Path]:
        if not is_remote(pattern):
            return _expand(pattern, self.key)
        if pattern not in self._copies:
            self._copies[pattern] = local_copies(pattern, self.key)
        return self._copies[pattern]

    @property
    def settings(self) -> dict:
        return asdict(self.reading)

    def named(self, path: Path) -> list[str]:
        return self.reading.named(path)


def _expand(pattern: str, key: str) -> list[Path]:
    """The files, sorted, that `pattern` names. Raises ValueError for a folder, and where there is no file."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"{key}={pattern!r} is a folder; name the files in it: '{path}/**/*.txt'")
    if path.is_file():  # also where its name holds glob characters, as in "draft[2].txt"
        return [path]
    if not glob.has_magic(pattern):
        raise ValueError(f"{key}={pattern!r}: there is no such file here in {Path.cwd()}; check the path")
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not (matches := [match for match in matches if match.is_file()]):
        raise ValueError(f"{key}={pattern!r} matches no file here in {Path.cwd()}; check the folder and the ending")
    return matches


def split_rule(documents: Iterable[Document]) -> str:
    """How to split so many documents: "hash" for MANY_DOCUMENTS or more, else "tail". Reads no more than it needs."""
    ends = (document for document in documents if document.ends)
    return "hash" if sum(1 for _ in islice(ends, MANY_DOCUMENTS)) == MANY_DOCUMENTS else "tail"


def split_documents(documents: Iterable[Document], fraction: float, rule: str) -> Iterator[tuple[str, Document]]:
    """Each document, or piece of one, as ("train" or "validation", piece), in order.

    Windows cut later cannot straddle the two, so no validation text is trained on. "hash" puts a whole document where
    the hash of its text says (of its first part, where it comes in parts): it stays there when others are added, and
    copies of it go the same way. "tail" cuts `fraction` of the characters off the end of each document.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.validation_fraction={fraction} must lie between 0 and 1, such as 0.1")
    side = "train"
    for document in documents:
        if rule == "hash":
            if document.start == 0:
                side = "validation" if _hash_share(document.text) < fraction else "train"
            yield side, document
            continue
        length = len(document.text) if document.length is None else document.length
        # Rounded, since 1 - 0.9 is 0.09999999999999998: a fraction of 0.1 cuts exactly where int(n * 0.9) does.
        cut = int(length * round(1 - fraction, 12))
        here = min(max(cut - document.start, 0), len(document.text))  # where in this part the cut falls
        for side, text, start, end in (
            ("train", document.text[:here], document.start, cut),
            ("validation", document.text[here:], max(document.start - cut, 0), length - cut),
        ):
            if text:
                is_whole = document.length is None
                yield (
                    side,
                    replace(document, text=text, start=0 if is_whole else start, length=None if is_whole else end),
                )


def _hash_share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, evenly spread."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64

"""Text in: files become documents, and these become training and validation text, before any windows are cut."""

import glob
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

MANY_DOCUMENTS = 100  # from here on whole documents go to one side; below, each one gives its tail to validation
GUTENBERG_START = re.compile(r"^\*{3} *START OF [^*]*PROJECT GUTENBERG[^*]*\*{3}.*\n", re.MULTILINE | re.IGNORECASE)
GUTENBERG_END = re.compile(r"^\*{3} *END OF [^*]*PROJECT GUTENBERG", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Optimum:
    """What the best possible model makes of a text of n bytes in UTF-8, and last of its end; all (n + 1,)."""

    nll: np.ndarray  # -log p of each after those before it, in nats
    kinds: np.ndarray  # of the choice that it belongs to, a word such as "recall"
    distances: np.ndarray  # bytes back to where the fact that it repeats stood last; -1 where it repeats none


class Source(ABC):
    """Where text comes from. It can be read many times, and gives the same documents in the same order each time."""

    knows_optimum = False  # whether the probability of a document is known, as it is where documents are generated

    @abstractmethod
    def paths(self) -> list[Path]:
        """The input files, which exist: downloaded first where needed."""

    @abstractmethod
    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one of `paths()`."""

    def documents(self) -> Iterator[Document]:
        for path in self.paths():
            yield from self.read(path)

    @property
    def settings(self) -> dict:
        """What else changes the documents, in plain types: with the files' bytes, it tells when a cache is stale."""
        return {}

    def optimum(self, text: str) -> Optimum:
        """Of a document, where the source `knows_optimum`. Raises ValueError for a text that cannot come up."""
        raise NotImplementedError


class Files(Source):
    """Text files, one document each. `files` is a path or glob, or a list of them; `**` means any depth."""

    def __init__(self, files: str | Sequence[str], strip_gutenberg: bool = True):
        self.files = [files] if isinstance(files, str) else [str(pattern) for pattern in files]
        self.strip_gutenberg = strip_gutenberg

    def paths(self) -> list[Path]:
        if not self.files:
            raise ValueError("data.files is empty; name a file or a glob such as 'texts/**/*.txt'")
        found: dict[Path, str] = {}  # resolved path -> the pattern that gave it
        for pattern in self.files:
            for path in _expand(pattern):
                if path.resolve() in found:
                    raise ValueError(
                        f"data.files: {path} is named twice, by {found[path.resolve()]!r} and {pattern!r}; "
                        "its text would count double: keep one of them"
                    )
                found[path.resolve()] = pattern
        return list(found)

    def read(self, path: Path) -> Iterator[Document]:
        yield Document(path.name, read_text(path, strip_gutenberg=self.strip_gutenberg))

    @property
    def settings(self) -> dict:
        return {"strip_gutenberg": self.strip_gutenberg}


def _expand(pattern: str) -> list[Path]:
    """The files, sorted, that `pattern` names. Raises ValueError for a folder, and where there is no file."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"data.files={pattern!r} is a folder; name the files in it: '{path}/**/*.txt'")
    if path.is_file():  # also where its name holds glob characters, as in "draft[2].txt"
        return [path]
    if not glob.has_magic(pattern):
        raise ValueError(f"data.files={pattern!r}: there is no such file here in {Path.cwd()}; check the path")
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not (matches := [match for match in matches if match.is_file()]):
        raise ValueError(
            f"data.files={pattern!r} matches no file here in {Path.cwd()}; check the folder and the ending"
        )
    return matches


def read_text(path: Path, *, strip_gutenberg: bool = False) -> str:
    """The text of a UTF-8 file, without byte-order mark and with LF line ends.

    Raises ValueError, naming the file, if it is missing, binary, not UTF-8, or holds no text.
    """
    path = Path(path)
    try:
        text = decode_text(path.read_bytes(), path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    if strip_gutenberg:
        text = without_gutenberg(text)
    if not text.strip():
        raise ValueError(f"{path} holds no text; remove it from the data, or check that it was written whole")
    return text


def decode_text(content: bytes, path: Path, first_byte: int = 0, first_line: int = 1) -> str:
    """`content`, which stands in `path` from `first_byte` and `first_line` on, as text with LF line ends."""
    if (null := content.find(b"\0")) >= 0:
        raise ValueError(
            f"{path} is binary: byte {first_byte + null} is NUL; give text files only (UTF-16 text must become UTF-8: "
            "iconv -f UTF-16 -t UTF-8)"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path} is not UTF-8: byte {first_byte + error.start} (0x{content[error.start]:02x}, line {line}) is "
            "invalid; convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
    if first_byte == 0:
        text = text.removeprefix("\ufeff")  # the byte-order mark
    return text.replace("\r\n", "\n").replace("\r", "\n")


def without_gutenberg(text: str) -> str:
    """`text` without Project Gutenberg's header and licence; text that has neither comes back unchanged."""
    start, end = GUTENBERG_START.search(text), GUTENBERG_END.search(text)
    if not (start or end):
        return text
    return text[start.end() if start else 0 : end.start() if end else None].strip("\n") + "\n"


def split_rule(documents: Iterable[Document]) -> str:
    """How to split so many documents: "hash" for MANY_DOCUMENTS or more, else "tail". Reads no more than it needs."""
    return "hash" if sum(1 for _ in islice(documents, MANY_DOCUMENTS)) == MANY_DOCUMENTS else "tail"


def split_documents(documents: Iterable[Document], fraction: float, rule: str) -> Iterator[tuple[str, Document]]:
    """Each document, or piece of one, as ("train" or "validation", piece), in order.

    Windows cut later cannot straddle the two, so no validation text is trained on. "hash" puts a whole document where
    the hash of its text says: it stays there when others are added, and copies of it go the same way. "tail" cuts
    `fraction` of the characters off the end of each document.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.validation_fraction={fraction} must lie between 0 and 1, such as 0.1")
    for document in documents:
        if rule == "hash":
            yield "validation" if _hash_share(document.text) < fraction else "train", document
            continue
        # Rounded, since 1 - 0.9 is 0.09999999999999998: a fraction of 0.1 cuts exactly where int(n * 0.9) does.
        cut = int(len(document.text) * round(1 - fraction, 12))
        for side, text in (("train", document.text[:cut]), ("validation", document.text[cut:])):
            if text:
                yield side, replace(document, text=text)


def _hash_share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, evenly spread."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64

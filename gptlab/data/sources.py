"""The sources that come with gptlab: prose and code from the Python at hand, and downloads with pinned checksums."""

import ast
import errno
import hashlib
import inspect
import logging
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import pooch
from filelock import FileLock

from gptlab.data.corpus import Source
from gptlab.data.document import Document
from gptlab.data.formats import Reading, read_documents, read_text
from gptlab.files import cache_dir, sha256_of_file

log = logging.getLogger(__name__)

# Tests, bundled third parties, and files that are tables: character sets, and the help topics as one string.
NOT_SOURCE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
TABLES = {"encodings", "pydoc_data"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules() -> list[Path]:
    """The source files of the standard library that are written by hand and read by people."""
    found: list[Path] = []
    for folder, folders, files in os.walk(_standard_library()):
        folders[:] = set(folders) - NOT_SOURCE - TABLES  # not even looked into: site-packages may hold 100,000 files
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


class PySource(Source):
    """The source code of Python's standard library, one document a module. It differs between Python versions."""

    def paths(self) -> list[Path]:
        return [path for path in _modules() if path.stat().st_size]  # an empty __init__.py is no document

    def read(self, path: Path) -> Iterator[Document]:
        yield Document(path.relative_to(_standard_library()).as_posix(), read_text(path))


class PyDocs(Source):
    """English prose from Python's own help: one document a help topic, and one a module with its longer docstrings.

    It differs between Python versions. A text whose paragraphs all stand in others is left out: a sixth of the topics'
    text is sections of longer topics, and would carry validation text into training.
    """

    MIN_CHARACTERS = 200  # shorter docstrings are labels more than prose

    def paths(self) -> list[Path]:
        return [path for path in (_topics_file(),) if path.is_file()] + _modules()

    def documents(self) -> Iterator[Document]:
        return iter(self._documents)

    def read(self, path: Path) -> Iterator[Document]:
        return self._read(path, seen=set())

    @cached_property
    def _documents(self) -> list[Document]:  # kept, being 2 MB, since every module must be parsed to get it
        seen: set[str] = set()
        return [document for path in self.paths() for document in self._read(path, seen)]

    def _read(self, path: Path, seen: set[str]) -> Iterator[Document]:
        tree = ast.parse(path.read_bytes())
        if path == _topics_file():
            topics = ast.literal_eval(next(node.value for node in tree.body if isinstance(node, ast.Assign)))
            longest_first = sorted(topics, key=lambda name: (-len(topics[name]), name))
            for name in sorted(name for name in longest_first if _has_new_paragraph(topics[name], seen)):
                yield Document(f"topics/{name}", topics[name].strip() + "\n")
            return
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS))
        docstrings = (inspect.cleandoc(ast.get_docstring(node, clean=False) or "") for node in nodes)
        long = [text for text in docstrings if len(text) >= self.MIN_CHARACTERS and _has_new_paragraph(text, seen)]
        if long:
            yield Document(path.relative_to(_standard_library()).as_posix(), "\n\n".join(long) + "\n")


def _topics_file() -> Path:
    return _standard_library() / "pydoc_data" / "topics.py"


def _has_new_paragraph(text: str, seen: set[str]) -> bool:
    """Whether `text` has a paragraph that is not in `seen`, which then holds all of its paragraphs."""
    paragraphs = {" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)}
    paragraphs = {paragraph for paragraph in paragraphs if len(paragraph) >= 80} or paragraphs  # not titles
    is_new = not paragraphs <= seen
    seen |= paragraphs
    return is_new


@dataclass(frozen=True)
class RemoteFile:
    """A file to download: `local` is its name on this machine, `sha256` null for one that may change."""

    url: str
    local: str
    sha256: str | None
    size_bytes: int | None


class Download(Source):
    """Files from the web. One that lies in `$GPTLAB_DATA_DIR` under its `local` name is used instead of a download.

    `files` are mappings with the fields of RemoteFile. With `separator`, each text between two lines that are just
    that is a document, and files are read as a stream; without, each file is one document.
    """

    def __init__(self, files: Sequence[Mapping], separator: str | None = None, strip_gutenberg: bool = False):
        try:
            self.files = [RemoteFile(**file) for file in files]
        except TypeError as error:
            names = ", ".join(field.name for field in fields(RemoteFile))
            raise ValueError(f"data.source.files: each file must have just {names} ({error})") from error
        if separator is not None and (not separator.strip() or strip_gutenberg):
            raise ValueError(
                f"data.source.separator={separator!r} must be a line of text, or null; and with it "
                "data.source.strip_gutenberg must be false"
            )
        self.reading = Reading(separator=separator, strip_gutenberg=strip_gutenberg)

    def paths(self) -> list[Path]:
        return self._paths

    @cached_property
    def _paths(self) -> list[Path]:  # once a run: each look checks the checksums of whole files
        return [find_or_download(file) for file in self.files]

    def read(self, path: Path) -> Iterator[Document]:
        yield from read_documents(path, self.reading, self._count)

    @property
    def settings(self) -> dict:
        return asdict(self.reading)

    def named(self, path: Path) -> list[str]:
        return self.reading.named(path)


def find_or_download(file: RemoteFile) -> Path:
    """The file in `$GPTLAB_DATA_DIR`, else in the cache, else from the web. Raises OSError where there is none."""
    if folder := os.environ.get("GPTLAB_DATA_DIR"):
        own = Path(folder).expanduser() / file.local
        if own.is_file():
            if file.sha256 and (found := sha256_of_file(own)) != file.sha256:
                log.warning("%s is not the file that is pinned: its sha256 is %s, not %s", own, found, file.sha256)
            return own
    # The address is part of the place: another file of the same name must not be taken for this one.
    folder = cache_dir() / "downloads" / hashlib.sha256(file.url.encode()).hexdigest()[:8]
    target = folder / file.local
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        _download(file, target)
    return target


def _download(file: RemoteFile, target: Path) -> None:
    pooch.get_logger().setLevel(logging.WARNING)
    is_new = not target.exists()
    remedy = (
        f"or put the file at {os.environ.get('GPTLAB_DATA_DIR') or '$GPTLAB_DATA_DIR'}/{file.local} yourself "
        "(GPTLAB_DATA_DIR is an environment variable that names a folder)"
    )
    if is_new:
        size = f" ({file.size_bytes / 1e6:.1f} MB)" if file.size_bytes else ""
        log.info("downloading %s%s to %s", file.url, size, target)
        if file.size_bytes and (free := shutil.disk_usage(target.parent).free) < file.size_bytes:
            raise OSError(
                errno.ENOSPC,
                f"{file.url} needs {file.size_bytes} bytes and {target.parent} has {free}; set GPTLAB_CACHE_DIR to a "
                f"larger disk, {remedy}",
            )
    known_hash = f"sha256:{file.sha256}" if file.sha256 else None
    try:
        # A temporary file, checked, then renamed: an interrupted download leaves no half file under this name.
        pooch.retrieve(file.url, known_hash, target.name, target.parent, progressbar=sys.stderr.isatty())
    except ValueError as error:  # it names the hash found and the one expected
        raise ValueError(
            f"{file.url} is not the file that is pinned: {error} If the site revised it and you trust it, set "
            f"data.source.files' sha256 to the new hash or to null; {remedy}"
        ) from error
    except OSError as error:
        raise OSError(
            f"cannot download {file.local} from {file.url}\nconnect to the network, {remedy}\n"
            f"({type(error).__name__}: {error})"
        ) from error
    if is_new and not file.sha256:
        log.info("%s is not pinned; the file got has sha256 %s", file.url, sha256_of_file(target))

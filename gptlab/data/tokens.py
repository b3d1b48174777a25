"""Tokens on disk: a source becomes two flat files of ids, once, and is then read through memory maps.

A prepared folder holds `train.bin` and `validation.bin` (headerless little-endian uint16, or uint32 for more than
65,536 tokens), the tokenizer, and `meta.json`, which is written last: a folder without it does not count.
"""

import errno
import functools
import hashlib
import inspect
import json
import logging
import mmap
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock

from gptlab import chunks, pieces, vocabulary
from gptlab.data import encoding
from gptlab.data.corpus import MANY_DOCUMENTS, Source, split_documents, split_rule
from gptlab.data.document import Document
from gptlab.data.encoding import SIDES
from gptlab.data.states import look_at, refuse_changed
from gptlab.data.workers import processes
from gptlab.files import open_more, sha256_of_file
from gptlab.run import write_json
from gptlab.tokenizer import EOS_ID, Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

FORMAT = 5  # raise it when the same text would give other files
CLEANED_AWAY = "no document is long enough, or none is new; lower data.min_characters, or give more text"
ELSEWHERE = "free some space, or set GPTLAB_CACHE_DIR to a folder with room that can be written"
BLOCK_BYTES = 2**23  # read at a time by who reads all
T = TypeVar("T")


class TokenFile:
    """The ids in a file, mapped into memory: slicing reads only what is asked for, and workers share the pages."""

    first_byte = 0  # where in the file they begin

    def __init__(self, path: Path, dtype: str, n_tokens: int):
        self.path = Path(path)
        self.dtype = np.dtype(dtype)
        self.n_tokens = n_tokens
        found = self.path.stat().st_size if self.path.is_file() else "no"
        if found != (expected := n_tokens * self.dtype.itemsize):
            raise ValueError(f"{path} should hold {expected} bytes and holds {found}; delete its folder to rebuild it")

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self.array[index]

    @property
    def parts(self) -> "list[TokenFile]":
        """The runs of ids that windows are cut from, each by itself."""
        return [self]

    @property
    def n_bytes(self) -> int:
        return self.n_tokens * self.dtype.itemsize

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """The ids from `start` to `stop` in order, as (place of the first, ids); read, not mapped."""
        stop = self.n_tokens if stop is None else stop
        while start < stop:
            count = min(BLOCK_BYTES // self.dtype.itemsize, stop - start)
            block = np.fromfile(self.path, self.dtype, count, offset=self.first_byte + start * self.dtype.itemsize)
            if len(block) < count:
                raise ValueError(f"{self.path} has become shorter while it was read: write it anew")
            yield start, block
            start += count

    @cached_property
    def array(self) -> np.ndarray:
        pages = _mapped(self.path)
        # Windows lie anywhere: what the system would read ahead, 128 KiB a window, is up to 100 times the wait for a
        # batch where the file is larger than what memory holds of it (benchmarks/scaling.py).
        pages.madvise(mmap.MADV_RANDOM)
        # a plain view: slicing np.memmap costs ten times as much
        return np.frombuffer(pages, self.dtype, self.n_tokens, self.first_byte)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "array"}  # workers map the file anew


def _mapped(path: Path) -> mmap.mmap:
    """The file as memory, which takes an open file for as long as it is used: of thousands, more than is usual."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        if not open_more():
            raise OSError(
                errno.EMFILE, "too many files are open: raise the limit (ulimit -n), or join the files", str(path)
            ) from error
    return _mapped(path)


class Joined:
    """Runs of ids in several files as one side of the data; no window lies across two of them."""

    def __init__(self, parts: list[TokenFile]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class Prepared:
    """A source as tokens: what training, evaluation and the run record need to know of the data."""

    folder: Path
    train: TokenFile | Joined
    validation: TokenFile | Joined
    tokenizer: Tokenizer
    meta: dict

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.meta)


def fingerprint_of(meta: dict) -> str:
    """Equal for equal tokens with equal meaning, wherever and whenever they were prepared."""
    parts = [meta["tokenizer_fingerprint"], *(meta["splits"][side]["sha256"] for side in SIDES)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_prepared(folder: Path, trust: tuple[str, ...] = ()) -> Prepared:
    """The tokens in `folder`. Raises ValueError if it is not there, incomplete or damaged."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, where this gptlab reads {FORMAT}")
        files = {
            side: TokenFile(folder / f"{side}.bin", meta["dtype"], meta["splits"][side]["tokens"]) for side in SIDES
        }
        for side, file in files.items():
            if sha256_of_file(file.path) != meta["splits"][side]["sha256"]:
                raise ValueError(f"the bytes of {side}.bin are not those that were written")
        tokenizer = load_tokenizer(folder / "tokenizer", trust)
        if tokenizer.fingerprint != meta["tokenizer_fingerprint"]:
            raise ValueError("its tokenizer is not the one that made it")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no complete prepared data ({error}); prepare it again") from error
    return Prepared(folder, **files, tokenizer=tokenizer, meta=meta)


def prepare(
    source: Source,
    tokenizer: Tokenizer | Callable[..., Tokenizer],
    *,
    validation_source: Source | None = None,
    validation_fraction: float,
    cache: Path,
    workers: int | None = None,
    tokenizer_source: Source | None = None,
) -> Prepared:
    """Split the source, get the tokenizer, and encode both sides, unless `cache` has the result already.

    `tokenizer` is one, or a partial of some `Tokenizer.train`, which then learns from the training text alone, or from
    all of `tokenizer_source`. With a `validation_source`, all of `source` is for training. Any number of processes may
    call this at once, and die at any time: one builds, the others wait, and no half of a file is used; the next one
    goes on where a killed one was. `workers` processes encode, or None for as many as is quickest.
    """
    text = SplitText(source, validation_source, validation_fraction)
    tokenizer = tokenizer_for([text], tokenizer, cache, tokenizer_source)
    return encoded(text, tokenizer, cache, workers)


def tokenizer_for(
    texts: Sequence["SplitText"],
    tokenizer: Tokenizer | Callable[..., Tokenizer],
    cache: Path,
    source: Source | None = None,
) -> Tokenizer:
    """`tokenizer`, if it is one; else what it makes of all of `source`, or of the training side of `texts`."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    partial = tokenizer if isinstance(tokenizer, functools.partial) else functools.partial(tokenizer)
    owner = getattr(partial.func, "__self__", partial.func)  # the class, where it is a class's `train`
    name = [owner.__module__, owner.__qualname__, partial.func.__name__]
    if source is not None:
        records, states = look_at(source)
        learnt_from = [_source_identity(source, records)]
        content = (document.text for document in source.documents())
    else:
        states = {path: state for text in texts for path, state in text.states.items()}
        learnt_from = [text.training_identity for text in texts]
        content = (training for text in texts for training in text.training_texts())

    def build(folder: Path) -> None:
        made = partial(content)
        refuse_changed(states)
        made.save(folder)

    key = _key(FORMAT, name, _codes(owner), partial.args, partial.keywords, learnt_from)
    return _once(
        Path(cache) / "tokenizers" / key,
        load=lambda folder: load_tokenizer(folder, trust=(owner.__module__.split(".")[0],)),
        build=build,
    )


def encoded(text: "SplitText", tokenizer: Tokenizer, cache: Path, workers: int | None = None) -> Prepared:
    """Both sides of `text` as tokens, from the cache where it has them."""
    trust = (type(tokenizer).__module__.split(".")[0],)  # its code runs already
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    key = _key(FORMAT, tokenizer.fingerprint, _codes(type(tokenizer)), dtype, text.identity)
    prepared = _once(
        Path(cache) / "tokens" / key,
        load=lambda folder: open_prepared(folder, trust),
        build=lambda folder: _build(folder, text, tokenizer, dtype, workers, trust),
    )
    return replace(prepared, meta=prepared.meta | {"files": text.files})  # the same bytes may have stood elsewhere


class SplitText:
    """The text to prepare: its pieces, and the identities by which caches know it without reading it all."""

    def __init__(self, source: Source, validation_source: Source | None, fraction: float):
        self.source, self.validation_source = source, validation_source
        self.fraction = None if validation_source else fraction
        records, self.states = look_at(source)
        self.files = {"source": records}
        self.training_identity = [_source_identity(source, self.files["source"]), self.fraction, MANY_DOCUMENTS]
        self.identity = [self.training_identity]
        if validation_source:
            self.files["validation_source"], states = look_at(validation_source)
            self.states |= states
            self.identity.append(_source_identity(validation_source, self.files["validation_source"]))
            self._refuse_overlap()

    def _refuse_overlap(self) -> None:
        training = {record["sha256"]: record["path"] for record in self.files["source"]}
        for record in self.files["validation_source"]:
            if same := training.get(record["sha256"]):
                raise ValueError(
                    f"{record['path']} is validation text, and the same as {same}, which is training text: "
                    "leave it out of one of them"
                )

    @cached_property
    def rule(self) -> str:
        return "source" if self.validation_source else split_rule(self.source.documents())

    def pieces(self) -> Iterator[tuple[str, Document]]:
        """Every piece as ("train" or "validation", document). Raises ValueError, at the end, if a side got none."""
        if self.validation_source:
            for side, source in (("train", self.source), ("validation", self.validation_source)):
                is_empty = True
                for document in source.documents():
                    is_empty = False
                    yield side, document
                if is_empty and source.paths():  # of what is read while training, nothing is prepared
                    raise ValueError(f"no text is left for {side}: {CLEANED_AWAY}")
            return
        got = set()
        for side, document in split_documents(self.source.documents(), self.fraction, self.rule):
            got.add(side)
            yield side, document
        if not got:
            raise ValueError(f"no text is left: {CLEANED_AWAY}")
        for side, remedy in (("train", "lower"), ("validation", "raise")):
            if side not in got:
                raise ValueError(
                    f"no text is left for {side}: data.validation_fraction={self.fraction} gives it none; {remedy} it, "
                    "or give more text"
                )

    @property
    def bytes_read(self) -> int:
        """Of the files, as they lie on the disk, every time that they were read."""
        return sum(source.bytes_read for source in (self.source, self.validation_source) if source is not None)

    def training_texts(self) -> Iterator[str]:
        return (document.text for side, document in self.pieces() if side == "train")


def _source_identity(source: Source, files: list[dict]) -> list:
    kinds = [[kind.__module__, kind.__qualname__, _code(kind)] for kind in source.kinds]
    return [kinds, source.settings, [[file["sha256"], *source.named(Path(file["path"]))] for file in files]]


def _code(thing: type | Callable) -> str:
    """The hash of the module that defines `thing`: after an edit there, its work is not taken from the cache."""
    try:
        return sha256_of_file(Path(inspect.getfile(thing)))
    except (TypeError, OSError):  # it was typed at a prompt
        return ""


def _codes(tokenizer: type | Callable) -> list[str]:
    """Those of a kind of tokenizer: its own module, those of what it is derived from, and what cuts and learns."""
    kinds = [kind for kind in getattr(tokenizer, "__mro__", (tokenizer,)) if kind.__module__.split(".")[0] == "gptlab"]
    return [_code(part) for part in (tokenizer, *kinds, chunks.sample, pieces.learn, vocabulary.readable)]


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _once(folder: Path, load: Callable[[Path], T], build: Callable[[Path], None]) -> T:
    """What `load` makes of `folder`. Where it raises ValueError, `build` fills the folder first.

    One process builds at a time. What it leaves when it is killed does not load; the next one starts afresh, or, where
    there is a journal of how far it had come, goes on.
    """
    try:
        return load(folder)
    except ValueError:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"cannot write to {folder.parent} ({error.strerror}); {ELSEWHERE}") from error
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        try:
            return load(folder)  # built while this process waited for the lock
        except ValueError as error:
            if folder.exists() and not encoding.can_go_on(folder):
                log.warning("building anew what is damaged or unfinished: %s", error)
        if not encoding.can_go_on(folder):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        try:
            build(folder)
        except BaseException as error:
            if isinstance(error, ValueError | OSError) or not encoding.can_go_on(folder):  # else the next one goes on
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, f"no space for {folder} ({error.strerror}); {ELSEWHERE}") from error
            raise
        return load(folder)


def _build(
    folder: Path, text: SplitText, tokenizer: Tokenizer, dtype: str, workers: int | None, trust: tuple[str, ...]
) -> None:
    start = time.monotonic()
    _require_space(folder, text, tokenizer, np.dtype(dtype).itemsize)
    tokenizer.save(folder / "tokenizer")
    text_bytes = sum(file["size"] for files in text.files.values() for file in files)
    rule = text.rule  # found now, since it may take a reading of its own
    before = text.bytes_read
    progress = encoding.Progress(text_bytes, lambda: text.bytes_read - before)
    try:
        splits = encoding.encode(
            folder,
            text.pieces(),
            tokenizer,
            dtype,
            workers=processes(workers, text_bytes),
            trust=trust,
            progress=progress,
        )
    finally:
        progress.close()
    refuse_changed(text.states)
    meta = {
        "format": FORMAT,
        "dtype": dtype,
        "splits": splits,
        "split": {"rule": rule, "fraction": text.fraction},
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": EOS_ID,
        "files": text.files,
        "versions": {name: version(name) for name in ("gptlab", "numpy", "sentencepiece")},
    }
    write_json(folder / "meta.json", meta)
    encoding.finish(folder)
    tokens = sum(split["tokens"] for split in splits.values())
    log.info("prepared %s tokens in %.1f s: %s", f"{tokens:,}", time.monotonic() - start, folder)


def _require_space(folder: Path, text: SplitText, tokenizer: Tokenizer, itemsize: int) -> None:
    text_bytes = sum(file["size"] for files in text.files.values() for file in files)
    sample = next((document.text for _, document in text.pieces() if document.text.strip()), "")[:10_000]
    needed = int(text_bytes * itemsize * len(tokenizer.encode(sample)) / len(sample.encode("utf-8", "surrogatepass")))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(errno.ENOSPC, f"the tokens need about {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB are free")

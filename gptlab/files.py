"""Files that are there whole or not at all, and the manifest by which a damaged one is known."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill `path`, so that after any crash either the old file or the whole new one is there.

    Raises OSError (no space left, read-only folder) with the old file untouched and nothing left behind.
    """
    with _complete(path, write) as temporary:
        os.replace(temporary, path)
        sync(path.parent)  # the new name survives a power cut too


@contextlib.contextmanager
def _complete(path: Path, write: Callable[[BinaryIO], None]) -> Any:
    """The temporary file beside `path` that `write` has filled, on the disk for good; gone if anything then fails."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except BaseException as error:
        with contextlib.suppress(OSError):  # a file system that has become read-only
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a failed write names no file
            error.filename = str(path)
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp.{os.getpid()}")


def sync(path: Path) -> None:
    """Return when what was written to a file, or the names in a folder, are on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed writer left half-written; call it only while no other process writes there."""
    for leftover in folder.glob(".*.tmp.*"):
        leftover.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Let `target` be the file that `source` is now, without writing it twice; atomic."""
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        with open(source, "rb") as whole:
            write_atomically(target, lambda file: shutil.copyfileobj(whole, file))
    else:
        os.replace(temporary, target)


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError unless `folder` has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"checkpoints need {needed / 1e6:.1f} MB here, and {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, f"No space left: {what}", str(folder))


class _Hashed:
    """A file that takes the hash of what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def open_more() -> bool:
    """Let this process have as many files open as the system allows it; False where it has that already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def cache_dir() -> Path:
    """Where downloads, tokenizers and tokens are kept: `$GPTLAB_CACHE_DIR`, else `~/.cache/gptlab`."""
    return Path(os.environ.get("GPTLAB_CACHE_DIR") or "~/.cache/gptlab").expanduser().absolute()


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Manifest:
    """manifest.json of a folder: the hash of every file that was once written there in full, and its step.

    A hash enters before its file takes its name, so that a crash between the two leaves a file, old or new, that the
    manifest knows. `entries` are {sha256, bytes, step, names}, oldest first.
    """

    KEEP = 3  # entries of one name: as many crashes in a row, each between entry and file, would have to come

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / MANIFEST
        self.fault: str | None = None  # why there is none that can be used
        self.entries: list[dict[str, Any]] = []
        try:
            content = json.loads(self.path.read_text())
            if content["format"] != MANIFEST_FORMAT:
                raise ValueError(f"format {content['format']}")
            keys = ("sha256", "bytes", "step", "names")
            self.entries = [{key: entry[key] for key in keys} for entry in content["files"]]
        except FileNotFoundError:
            self.fault = f"there is no {MANIFEST}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.fault = f"{MANIFEST} cannot be read ({error})"

    def place_of(self, path: Path) -> int:
        """The place of the newest entry for that name, in the order of writing; -1 if there is none."""
        return max((place for place, entry in enumerate(self.entries) if path.name in entry["names"]), default=-1)

    def fault_of(self, path: Path) -> str | None:
        """What is wrong with the bytes of a file, if anything. Only for a folder whose manifest can be used."""
        size = path.stat().st_size
        known = {entry["sha256"]: entry["bytes"] for entry in self.entries}
        if size not in known.values():
            sizes = sorted({entry["bytes"] for entry in self.entries if path.name in entry["names"]})
            return f"it has {size:,} bytes and should have {' or '.join(f'{n:,}' for n in sizes) or 'another number'}"
        return None if sha256_of_file(path) in known else f"its bytes are none that {MANIFEST} knows: it is damaged"

    def add(self, sha256: str, size: int, step: int, names: Sequence[str], spare: str | None = None) -> None:
        """Enter a file that is about to have these names, and drop entries that no file can have any more.

        The file that had the first of them until now is called `spare` from here on.
        """
        if spare is not None and (place := self.place_of(self.folder / names[0])) >= 0:
            self.entries[place]["names"].append(spare)
        self.entries.append({"sha256": sha256, "bytes": size, "step": step, "names": list(names)})
        count: dict[str, int] = {}
        kept = []
        for number, entry in enumerate(reversed(self.entries)):
            held = [name for name in entry["names"] if number == 0 or (self.folder / name).exists()]
            for name in held:
                count[name] = count.get(name, 0) + 1
            if any(count[name] <= self.KEEP for name in held):
                kept.append(entry)
        self.entries = kept[::-1]
        text = json.dumps({"format": MANIFEST_FORMAT, "files": self.entries}, indent=1) + "\n"
        write_atomically(self.path, lambda file: file.write(text.encode()))


def write_listed(
    path: Path, write: Callable[[BinaryIO], None], step: int, links: Sequence[Path] = (), spare: Path | None = None
) -> None:
    """Write `path` atomically and enter it in its folder's manifest.

    `links` become further names of the same file, and `spare` the name of the one that was `path` before.
    """
    hashed: list[_Hashed] = []

    def write_hashed(file: BinaryIO) -> None:
        hashed.append(_Hashed(file))
        write(hashed[0])  # type: ignore[arg-type]

    with _complete(path, write_hashed) as temporary:
        names = [path.name, *(other.name for other in links)]
        if spare is not None and path.exists():
            link(path, spare)
        Manifest(path.parent).add(hashed[0].digest.hexdigest(), hashed[0].size, step, names, spare and spare.name)
        for other in links:  # first: whoever goes on from `path` never makes them again
            link(temporary, other)
        os.replace(temporary, path)
        sync(path.parent)

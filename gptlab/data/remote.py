"""Text that lies elsewhere, by URL: what is to be read several times is copied once into the cache."""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from filelock import FileLock
from fsspec.utils import get_protocol

from gptlab.files import cache_dir

log = logging.getLogger(__name__)
OFFLINE = "check the address and the network, or copy the files here and name them by path"
# Where file systems say what tells one content of a file from the next.
VERSIONS = (
    *("ETag", "etag", "Content-MD5", "md5Hash", "crc32c", "blob_id"),
    *("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created"),
)


def is_remote(pattern: str) -> bool:
    return "://" in pattern


def local_copies(url: str, key: str) -> list[Path]:
    """The files that a URL or a glob of them names, each copied into the cache unless this version of it is there.

    Any scheme that fsspec knows: https, s3, gs, hf, file. What https names is taken not to change. Raises ValueError,
    naming `key`, where a scheme is unknown or its library is not installed, and where nothing is found or can be read.
    """
    with _explained(url, key):
        system, paths = _found(url)
        return [_cached(system, path, get_protocol(url)) for path in paths]


def listed(url: str, key: str) -> list[tuple[str, int, str]]:
    """The address, size and version of each file that a URL or a glob of them names; nothing of them is read."""
    with _explained(url, key):
        system, paths = _found(url)
        infos = {path: info if info.get("size") is not None else system.info(path) for path, info in paths.items()}
        return [(system.unstrip_protocol(path), info["size"] or 0, _version(info)) for path, info in infos.items()]


def copy(url: str, target: Path, stopped: Callable[[], bool]) -> None:
    """Copy a file from elsewhere to `target`, which is there whole or not at all; OSError where it is `stopped`."""
    with _explained(url, "data.files"):
        system, path = fsspec.core.url_to_fs(url)
        _copy(system, path, target, stopped)


def content_of(place: str) -> bytes:
    """All of a small file, by path or URL. What goes wrong is each library's own exception."""
    with fsspec.open(place, "rb") as file:
        return file.read()


def _version(info: dict) -> str:
    return next((f"{key} {info[key]}" for key in VERSIONS if info.get(key)), "")


@contextmanager
def _explained(url: str, key: str) -> Iterator[None]:
    """Say what is wrong with `url`, which `key` names, in gptlab's own words: each library has others."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f'{key}={url!r}: {error}; pip install "gptlab[data]" brings s3, gs and hf') from error
    except ValueError as error:  # a scheme that nobody knows
        raise ValueError(f"{key}={url!r}: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{key}={url!r}: there is no such file, or no way to it ({error}); {OFFLINE}") from error
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"no space to copy {url} to; set GPTLAB_CACHE_DIR to a larger disk") from error
        raise OSError(f"cannot read {key}={url!r} ({type(error).__name__}: {error}); {OFFLINE}") from error


def _found(url: str) -> tuple[fsspec.AbstractFileSystem, dict[str, dict]]:
    """The files, sorted, each with what a listing says of it; nothing, where no listing was needed."""
    system, pattern = fsspec.core.url_to_fs(url)
    if not any(sign in pattern for sign in "*?["):
        return system, {pattern: {}}
    if not (found := system.glob(pattern, detail=True)):
        raise FileNotFoundError(f"it matches nothing; {OFFLINE}")
    return system, dict(sorted(found.items()))


def _cached(system: fsspec.AbstractFileSystem, path: str, protocol: str) -> Path:
    version = f"{protocol}/{path}/{system.ukey(path)}"  # size and date, or what else the place tells them apart by
    folder = cache_dir() / "remote" / hashlib.sha256(version.encode()).hexdigest()[:16]
    target = folder / name_of(path)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not target.exists():
            log.info("copying %s", system.unstrip_protocol(path))
            _copy(system, path, target)
    return target


def _copy(system: fsspec.AbstractFileSystem, path: str, target: Path, stopped: Callable[[], bool] = bool) -> None:
    partial = target.with_name(".partial")
    with system.open(path, "rb") as there, open(partial, "wb") as here:
        while block := there.read(2**20):
            if stopped():
                raise InterruptedError("nobody needs the copy any more")
            here.write(block)
        here.flush()
        os.fsync(here.fileno())
    os.replace(partial, target)


def name_of(address: str) -> str:
    """What a file is called, by its path or URL."""
    return Path(address.split("?")[0]).name or "index"

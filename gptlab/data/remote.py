"""Text that lies elsewhere, by URL: copied once into the cache, since checking, learning and encoding each read it."""

import hashlib
import logging
import os
import shutil
from pathlib import Path

import fsspec
from filelock import FileLock
from fsspec.utils import get_protocol

from gptlab.files import cache_dir

log = logging.getLogger(__name__)
OFFLINE = "check the address and the network, or copy the files here and name them by path"


def is_remote(pattern: str) -> bool:
    return "://" in pattern


def local_copies(url: str) -> list[Path]:
    """The files that a URL or a glob of them names, each copied into the cache unless this version of it is there.

    Any scheme that fsspec knows: https, s3, gs, hf, file. What https names is taken not to change. Raises ValueError
    where a scheme is unknown or its library is not installed, and where nothing is found or can be read.
    """
    try:
        system, pattern = fsspec.core.url_to_fs(url)
        found = sorted(system.glob(pattern)) if any(sign in pattern for sign in "*?[") else [pattern]
        if not found:
            raise FileNotFoundError(f"it matches nothing; {OFFLINE}")
        return [_copy(system, path, get_protocol(url)) for path in found]
    except ImportError as error:
        raise ValueError(f'data.files={url!r}: {error}; pip install "gptlab[data]" brings s3, gs and hf') from error
    except ValueError as error:  # a scheme that nobody knows
        raise ValueError(f"data.files={url!r}: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"data.files={url!r}: there is no such file, or no way to it ({error}); {OFFLINE}") from error
    except Exception as error:  # each library has its own
        raise OSError(f"cannot read data.files={url!r} ({type(error).__name__}: {error}); {OFFLINE}") from error


def _copy(system: fsspec.AbstractFileSystem, path: str, protocol: str) -> Path:
    version = f"{protocol}/{path}/{system.ukey(path)}"  # size and date, or what else the place tells them apart by
    folder = cache_dir() / "remote" / hashlib.sha256(version.encode()).hexdigest()[:16]
    target = folder / (Path(path.split("?")[0]).name or "index")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not target.exists():
            log.info("copying %s", system.unstrip_protocol(path))
            partial = folder / ".partial"
            with system.open(path, "rb") as there, open(partial, "wb") as here:
                shutil.copyfileobj(there, here, 2**20)
                here.flush()
                os.fsync(here.fileno())
            os.replace(partial, target)
    return target

"""Files opened as their endings say, compressed or not, with errors that name them."""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

FRAME_BYTES = 2**12  # of .zst at a time: they may become 30,000 times as many
Count = Callable[[int], None]


def _open_zstd(file: BinaryIO) -> BinaryIO:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.open(file)
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ValueError('reading .zst takes zstandard: pip install "gptlab[data]"') from error
    return io.BufferedReader(_Frames(file, lambda: zstandard.ZstdDecompressor().decompressobj()), 2**17)


class _Frames(io.RawIOBase):
    """Compressed frames, one after another. Raises EOFError where the last one is cut off, as gzip does."""

    def __init__(self, file: BinaryIO, new: Callable[[], Any]):
        self.file, self.new = file, new
        self.frame: Any = None  # the one that has begun and not ended
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            if not (packed := self.packed or self.file.read(FRAME_BYTES)):
                if self.frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self.frame, self.packed = self.frame or self.new(), b""
            self.ready = memoryview(self.frame.decompress(packed))
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


class _Counted(io.FileIO):
    """A file that tells how much of it was read."""

    count: Count

    def readinto(self, buffer: Any) -> int:
        self.count(size := super().readinto(buffer))
        return size

    def readall(self) -> bytes:
        self.count(len(content := super().readall()))
        return content


class opened:  # noqa: N801  it is used as a function is
    """`with opened(path, count) as file`: the bytes of a file, decompressed by its ending.

    Raises ValueError, naming the file, for what goes wrong with it, also while it is read.
    """

    def __init__(self, path: Path, count: Count):
        self.path, self.count = path, count

    def __enter__(self) -> BinaryIO:
        try:
            raw = _Counted(self.path)
            raw.count = self.count
            self.raw = io.BufferedReader(raw, 2**20)
            opener = OPENERS.get(self.path.suffix.lower())
            self.file = opener(self.raw) if opener else self.raw
        except OSError as error:
            raise self._unreadable(error) from error
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return self.file

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.file.close()
        self.raw.close()
        damaged = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
        if isinstance(error, damaged) or (kind is not None and kind.__name__ == "ZstdError"):
            said = f"{self.path} is damaged, or not what its ending says ({error}): copy it here again"
            raise ValueError(said) from error
        if isinstance(error, OSError):
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> ValueError:
        reason = error.strerror or str(error)
        return ValueError(f"cannot read {self.path}: {reason}; check the path and its permissions")

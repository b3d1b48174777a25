"""Files of token ids that are there already, mapped where they lie; docs/tokens.md is the specification of a shard."""

import glob
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from gptlab.data.tokens import TokenFile
from gptlab.files import sync
from gptlab.run import write_json
from gptlab.tokenizer import EOS_ID

log = logging.getLogger(__name__)

SHARD_FORMAT = 1
DTYPES = {"<u2": 2**16, "<u4": 2**32}  # and how many ids each can hold
ENDINGS = (".bin", ".npy")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Sidecar:
    """What `<name>.bin.json` says of `<name>.bin`. Raises ValueError, naming the field, for what cannot be."""

    dtype: str  # "<u2" or "<u4"
    tokens: int  # ids in the file, ends of documents included
    documents: int  # how many of them are eos_id
    vocab_size: int  # of the tokenizer: every id is less
    sha256: str  # of the .bin file's bytes
    eos_id: int = EOS_ID  # stands after each document
    bytes: int | None = None  # of the text in UTF-8, where that is known
    tokenizer_fingerprint: str | None = None  # of the gptlab tokenizer that made the ids, if one did

    def __post_init__(self):
        for name in ("tokens", "documents", "vocab_size", "eos_id", "bytes"):
            value, may_miss = getattr(self, name), name == "bytes"
            if not ((type(value) is int and value >= 0) or (value is None and may_miss)):
                raise ValueError(f"{name}={value!r} must be a whole number from 0 on")
        for name in ("sha256", "tokenizer_fingerprint"):
            value, may_miss = getattr(self, name), name == "tokenizer_fingerprint"
            if not ((isinstance(value, str) and SHA256.fullmatch(value)) or (value is None and may_miss)):
                raise ValueError(f"{name}={value!r} must be 64 hexadecimal digits, in small letters")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.vocab_size > DTYPES[self.dtype]:
            raise ValueError(f"vocab_size={self.vocab_size} does not fit dtype={self.dtype!r}")
        if self.eos_id != EOS_ID:
            raise ValueError(
                f"eos_id={self.eos_id}, where every tokenizer of gptlab ends documents with {EOS_ID}: write the ids "
                "with one of those (tokenizer.path reads those of other libraries)"
            )


def sidecar_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Make the shard at `path`, whose ids are all written, count: from now on it is whole, whatever happens."""
    sync(path)
    write_json(sidecar_path(path), {"format": SHARD_FORMAT} | asdict(sidecar))


def read_sidecar(path: Path) -> Sidecar:
    """What stands beside the shard at `path`. Raises ValueError, naming the file, where that is no sidecar."""
    file = sidecar_path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != SHARD_FORMAT:
            raise ValueError(f"format {content['format']!r}, where this gptlab reads {SHARD_FORMAT}")
        known = [field.name for field in fields(Sidecar)]
        return Sidecar(**{name: content[name] for name in known if name in content})
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} has no sidecar {file.name}, which is written last: the shard is unfinished, or it was left behind "
            "(docs/tokens.md says what it holds)"
        ) from error
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} is no sidecar of a shard ({said}); write it anew, or leave the shard out") from error


class Ids(TokenFile):
    """`n_tokens` ids of a file, from `first_byte` on, mapped when they are first read."""

    def __init__(self, path: Path, dtype: str | np.dtype, n_tokens: int, first_byte: int = 0):
        self.path, self.dtype = Path(path), np.dtype(dtype)
        self.n_tokens, self.first_byte = n_tokens, first_byte

    def part(self, start: int, stop: int) -> "Ids":
        return Ids(self.path, self.dtype, stop - start, self.first_byte + start * self.dtype.itemsize)


@dataclass(frozen=True)
class Shard:
    """A file of ids, and what its sidecar says; a .npy file has none."""

    ids: Ids
    sidecar: Sidecar | None = None

    @property
    def path(self) -> Path:
        return self.ids.path


def open_shards(files: str | Sequence[str], key: str = "data.tokens") -> list[Shard]:
    """The shards that a path, a glob, or a list of them names, in that order; those of a glob by name.

    Their sidecars and sizes are checked, not the ids. A glob passes over what is unfinished or no shard, and a shard
    without ids is left out. Raises ValueError, naming `key` or the file, for anything else that cannot be used.
    """
    found: dict[Path, str] = {}  # resolved path -> the pattern that gave it
    shards = []
    for pattern in [files] if isinstance(files, str) else files:
        for path in _expand(str(pattern), key):
            if known := found.get(path.resolve()):
                raise ValueError(
                    f"{key}: {path} is named twice, by {known!r} and {pattern!r}; its ids would count double: keep one"
                )
            found[path.resolve()] = str(pattern)
            shards.append(_open(path))
    if not (shards := [shard for shard in shards if len(shard.ids)]):
        raise ValueError(f"{key}={files!r} holds no ids; name files that do")
    return shards


def _expand(pattern: str, key: str) -> list[Path]:
    if "://" in pattern:
        raise ValueError(f"{key}={pattern!r}: ids are mapped where they lie; copy the files to a disk of this machine")
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"{key}={pattern!r} is a folder; name the shards in it: '{path}/*.bin'")
    if path.is_file():  # also where its name holds glob characters
        if path.suffix not in ENDINGS:
            raise ValueError(f"{key}={pattern!r} is no file of ids; these end in {' or '.join(ENDINGS)}")
        return [path]
    if not glob.has_magic(pattern):
        raise ValueError(f"{key}={pattern!r}: there is no such file here in {Path.cwd()}; check the path")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    matches = [match for match in matches if match.suffix in ENDINGS and match.is_file()]
    whole = [match for match in matches if match.suffix != ".bin" or sidecar_path(match).is_file()]
    if passed_over := sorted(set(matches) - set(whole)):
        names = ", ".join(path.name for path in passed_over[:3])
        log.warning("passed over: %d shards without a sidecar, unfinished (%s)", len(passed_over), names)
    if not whole:
        found = f"only {len(matches)} without their sidecars" if matches else "no .bin or .npy file"
        raise ValueError(f"{key}={pattern!r} matches {found}, here in {Path.cwd()}; check the folder and the ending")
    return whole


def _open(path: Path) -> Shard:
    if path.suffix == ".npy":
        return Shard(_open_npy(path))
    sidecar = read_sidecar(path)
    size, expected = path.stat().st_size, sidecar.tokens * np.dtype(sidecar.dtype).itemsize
    if size != expected:
        raise ValueError(
            f"{path} has {size:,} bytes, and by its sidecar {sidecar.tokens:,} tokens, which take {expected:,}: it is "
            "truncated, or the sidecar is of another file; write both anew, or leave the shard out"
        )
    return Shard(Ids(path, sidecar.dtype, sidecar.tokens), sidecar)


def _open_npy(path: Path) -> Ids:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects, and archives, which np.load opens
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of ids, or a damaged one ({error})") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path} holds an array of {array.dtype} in {array.ndim} dimensions; ids are one row of whole numbers: "
            "np.save('ids.npy', ids.reshape(-1).astype('uint16'))"
        )
    return Ids(path, array.dtype, array.size, array.offset)

"""Files of ids are read once, from end to end, and what was found is remembered: another start need not read them."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from gptlab.data.shards import Shard
from gptlab.data.tokens import ELSEWHERE, TokenFile
from gptlab.run import write_json
from gptlab.tokenizer import EOS_ID, UNK_ID, Tokenizer

log = logging.getLogger(__name__)

CHECK_FORMAT = 1  # raise it when a check would find other things, or keep them otherwise
MOST_THREADS = 8
COUNTED = 2**17  # ids at a time: what fits the processor's cache is counted twice as fast


@dataclass(frozen=True)
class Checked:
    """What a reading of a whole shard found: the hash of the file, and what stands before and after the cut."""

    sha256: str
    before: dict[str, int]  # tokens, documents, unknown_tokens, bytes
    after: dict[str, int]


def check_shards(
    shards: list[Shard], cuts: list[int | None], tokenizer: Tokenizer, cache: Path, again: bool
) -> list[Checked]:
    """What is known of each shard, those read that nothing is known of; by one process at a time."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {cache} ({error.strerror}); {ELSEWHERE}") from error
    places = [cache / f"{_key(shard, cut, tokenizer)}.json" for shard, cut in zip(shards, cuts, strict=True)]
    known = [None if again else _remembered(place) for place in places]
    if all(known):
        return known
    with FileLock(cache / f".{hash_of([place.name for place in places])[:24]}.lock"):
        known = [None if again else _remembered(place) for place in places]
        todo = [number for number, found in enumerate(known) if found is None]
        size = sum(shards[number].ids.n_bytes for number in todo)
        token_bytes = bytes_of_tokens(tokenizer)
        start = time.monotonic()
        hidden = not sys.stderr.isatty()
        bar = tqdm(total=size, unit="B", unit_scale=True, desc="ids", delay=1, leave=False, disable=hidden)

        def check(number: int) -> Checked:
            found = check_shard(shards[number], cuts[number], token_bytes, bar.update)
            write_json(places[number], {"path": str(shards[number].path)} | asdict(found))
            return found

        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS))  # hashing and counting let other threads run
        try:
            for number, found in zip(todo, pool.map(check, todo), strict=True):
                known[number] = found
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()
        speed = size / 1e6 / max(time.monotonic() - start, 1e-9)
        log.info("checked %.1f MB of ids in %d files, %.0f MB/s", size / 1e6, len(todo), speed)
    return known


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Of how many bytes of text each token is."""
    return np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])


def check_shard(shard: Shard, cut: int | None, token_bytes: np.ndarray, count: Callable[[int], object]) -> Checked:
    """Read a shard from end to end. Raises ValueError, naming the file, for an id or a sidecar that is not right.

    `token_bytes` has the bytes of text of each token of the vocabulary; `count` is told of the bytes as they are read.
    """
    ids, before = shard.ids, shard.path.stat()
    digest, cut = hashlib.sha256(), len(shard.ids) if cut is None else cut
    times = np.zeros((2, len(token_bytes)), dtype=np.int64)  # how often each id stands before, and after, the cut
    with open(shard.path, "rb") as file:
        digest.update(file.read(ids.first_byte))
    for start, block in ids.blocks():
        digest.update(block.data)
        require_known(ids, start, block, len(token_bytes))
        here = min(max(cut - start, 0), len(block))
        for row, part in zip(times, (block[:here], block[here:]), strict=True):
            for first in range(0, len(part), COUNTED):
                row += np.bincount(part[first : first + COUNTED].astype(np.int64), minlength=len(token_bytes))
        count(block.nbytes)
    after = shard.path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{shard.path} changed while it was read: wait until it is written, and start again")
    found = Checked(digest.hexdigest(), *(_sums(row, token_bytes) for row in times))
    if (sidecar := shard.sidecar) is not None:
        if sidecar.sha256 != found.sha256:
            raise ValueError(
                f"{shard.path} is damaged, or not the file of its sidecar: its sha256 is {found.sha256}, and that of "
                f"the sidecar {sidecar.sha256}; restore it, or write both anew"
            )
        if sidecar.documents != (ends := found.before["documents"] + found.after["documents"]):
            raise ValueError(
                f"{shard.path} has {ends:,} ids that end a document ({EOS_ID}), and by its sidecar "
                f"{sidecar.documents:,}: write one of that id after each document"
            )
    return found


def require_known(ids: TokenFile, start: int, block: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError where a block of `ids`, which begins at `start`, has one that is no token."""
    if block.max() < vocab_size and (block.dtype.kind == "u" or block.min() >= 0):
        return
    index = int(np.flatnonzero((block >= vocab_size) | (block < 0))[0])
    at, place = start + index, ids.first_byte + (start + index) * ids.dtype.itemsize
    raise ValueError(
        f"{ids.path}: the id at place {at:,} (byte {place:,}) is {int(block[index])}, and the tokenizer has the ids 0 "
        f"to {vocab_size - 1}; give tokenizer.path the one that made the ids, or write them anew"
    )


def _sums(times: np.ndarray, token_bytes: np.ndarray) -> dict[str, int]:
    return {
        "tokens": int(times.sum()),
        "documents": int(times[EOS_ID]),
        "unknown_tokens": int(times[UNK_ID]),
        "bytes": int(times @ token_bytes),
    }


def _key(shard: Shard, cut: int | None, tokenizer: Tokenizer) -> str:
    """By what a shard is known to be the one that was read, without reading it again."""
    state = shard.path.stat()
    place = [str(shard.path.resolve()), state.st_size, state.st_mtime_ns, cut]
    sidecar = shard.sidecar and asdict(shard.sidecar)
    return hash_of([CHECK_FORMAT, place, sidecar, tokenizer.fingerprint])[:32]


def hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _remembered(place: Path) -> Checked | None:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        return Checked(content["sha256"], content["before"], content["after"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

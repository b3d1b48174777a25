"""How much of the held-out text also stands in the training text, by runs of 32 tokens, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptlab.data.tokens import TokenFile
from gptlab.data.windows import mix

GRAM = 32  # tokens; a power of two
MOST_GRAMS = 2**20  # held-out ones that are looked for: the share is known to 0.1 %, and 16 MiB are room enough
AT_ONCE = 2**16  # tokens: what fits the processor's cache
FACTOR = 0xD6E8FEB86659FD93  # odd, so that no bit of a token is lost


@dataclass(frozen=True)
class Overlap:
    """`share` of the held-out runs of GRAM tokens stand in the training tokens too.

    One in `every` was looked at, chosen by hash: `looked_at` of `runs`. `example` has the ids of the first one found.
    """

    share: float
    runs: int
    looked_at: int
    every: int
    example: np.ndarray | None


def overlap(train: Sequence[TokenFile], held_out: Sequence[TokenFile], most: int = MOST_GRAMS) -> Overlap | None:
    """None where no run of ids that is held out is GRAM long. Runs lie across documents, not across files."""
    total = sum(max(0, len(run) - GRAM + 1) for run in held_out)
    if not total:
        return None
    bits = max(0, (total - 1) // most).bit_length()  # of a hash, all of which must be 0
    known, times = _counted(held_out, bits, most)
    if not known.size:
        return None
    # A table of the lowest bits tells of most others at once that they are none of these.
    size = 1 << (16 * known.size - 1).bit_length()
    table, found = np.zeros(size, dtype=bool), np.zeros(known.size, dtype=bool)
    low = np.uint64(size - 1)
    table[known & low] = True
    for _, hashes in _hashes(train, bits):
        hashes = hashes[table[hashes & low]]
        places = np.minimum(np.searchsorted(known, hashes), known.size - 1)
        found[places[known[places] == hashes]] = True
    share = float(times[found].sum() / times.sum())
    return Overlap(share, total, int(times.sum()), 2**bits, _first(held_out, known[found], bits))


def _counted(runs: Sequence[TokenFile], bits: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The different hashes, in order, and how often each occurs."""
    known, times = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    waiting: list[np.ndarray] = []

    def merge() -> None:
        nonlocal known, times, waiting
        merged, of = np.unique(np.concatenate([known, *waiting]), return_inverse=True)
        weights = np.concatenate([times, np.ones(sum(map(len, waiting)), dtype=np.int64)])
        known, times, waiting = merged, np.bincount(of, weights, len(merged)).astype(np.int64), []

    for _, hashes in _hashes(runs, bits):
        waiting.append(hashes)
        if sum(map(len, waiting)) > most:
            merge()
    merge()
    return known, times


def _first(runs: Sequence[TokenFile], wanted: np.ndarray, bits: int) -> np.ndarray | None:
    """The ids of the first run that has one of the wanted hashes, which are in order."""
    if not wanted.size:
        return None
    for ids, hashes in _hashes(runs, bits=0):
        places = np.minimum(np.searchsorted(wanted, hashes), wanted.size - 1)
        if (hits := np.flatnonzero(wanted[places] == hashes)).size:
            return ids[hits[0] : hits[0] + GRAM]
    raise AssertionError("what was found is there")


def _hashes(runs: Sequence[TokenFile], bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids, and the 64-bit hashes of the runs of GRAM in them: all, or those that begin with so many bits of 0."""
    for run in runs:
        rest = np.zeros(0, dtype=np.int64)
        for _, block in run.blocks():
            ids = np.concatenate([rest, block.astype(np.int64)])
            rest = ids[-(GRAM - 1) :]
            for first in range(0, len(ids) - GRAM + 1, AT_ONCE):
                part = ids[first : first + AT_ONCE + GRAM - 1]
                hashes = gram_hashes(part)
                yield part, hashes[hashes >> np.uint64(64 - bits) == 0] if bits else hashes


def gram_hashes(ids: np.ndarray) -> np.ndarray:
    """One for each run of GRAM ids: polynomials of the hashes of its tokens, by doubling the length five times."""
    found = mix(ids.astype(np.uint64) + np.uint64(FACTOR))
    length, factor = 1, FACTOR
    while length < GRAM:
        found = found[:-length] * np.uint64(factor) + found[length:]
        length, factor = 2 * length, factor * factor % 2**64
    return mix(found)

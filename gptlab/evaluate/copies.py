"""Which spans of some texts also stand in a longer text, which is read in blocks and never held: exactly, to the byte.

The longer text passes by twice. Once for the hashes of its spans of 8, 16, 32 ... bytes, by which each text's longest
span is known to within a factor of two; and again, to follow those spans byte by byte.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from gptlab.data.windows import mix

LEAST = 8  # bytes; shorter spans are copies of nothing
SPAN = 50  # bytes of the spans whose share is told
AT_ONCE = 2**16  # bytes of the longer text that are looked at together: what fits the processor's cache
PAIRS = 2**18  # places of both texts that are compared together
FACTOR = 0xD6E8FEB86659FD93  # odd, so that no bit of a byte is lost

Blocks = Callable[[], Iterable[bytes]]  # the longer text, from its start each time


class Copies:
    """`longest`: of each text, the bytes of its longest span that stands in the longer text, 0 for less than LEAST.

    `shares`: the share of its spans of SPAN bytes that do, None for a text that has none.
    """

    def __init__(self, texts: list[bytes], blocks: Blocks):
        self.sizes = [len(text) for text in texts]
        self.own = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self.owner = np.repeat(np.arange(len(texts)), self.sizes)  # the text of each byte
        self.left = np.repeat(np.cumsum(self.sizes), self.sizes) - np.arange(len(self.own))  # from it to the text's end
        self.hashes = Hashes(self.own)
        self.longest = [0] * len(texts)
        self.shares: list[float | None] = [None] * len(texts)
        longest = max(self.sizes, default=0)
        self.lengths = [LEAST << k for k in range(longest.bit_length()) if LEAST << k <= longest]
        if self.lengths:
            self._look(blocks)

    def _look(self, blocks: Blocks) -> None:
        stands = self._which_stand(blocks)
        for text, size in enumerate(self.sizes):
            if size >= SPAN:
                self.shares[text] = float(stands[SPAN][(self.owner == text) & (self.left >= SPAN)].mean())
        best = np.zeros(len(self.sizes), dtype=np.int64)  # of each text, the longest of the lengths that stands
        for length in self.lengths:
            best[np.unique(self.owner[stands[length]])] = length
        starts = {length: stands[length] & (best[self.owner] == length) for length in self.lengths}
        known = {length: Places(self.hashes, length, of) for length, of in starts.items() if of.any()}
        if known:
            self._follow(blocks, known)

    def _which_stand(self, blocks: Blocks) -> dict[int, np.ndarray]:
        """For each length, and SPAN, whether the span that begins at each byte stands in the longer text."""
        known = {}
        for length in (*self.lengths, SPAN):
            known[length] = Known(self.hashes.at(length, np.flatnonzero(self.left >= length)))
        for part, _ in parts(blocks, max(known)):
            theirs = Hashes(part)
            alive = np.flatnonzero(known[LEAST].mark(theirs.all(LEAST)))
            for length in self.lengths[1:]:  # where no shorter span begins that is known, no longer one does
                alive = alive[alive <= len(part) - length]
                alive = alive[known[length].mark(theirs.at(length, alive))]
                if length <= SPAN < 2 * length:
                    known[SPAN].mark(theirs.at(SPAN, alive[alive <= len(part) - SPAN]))
        stands = {}
        for length, of_length in known.items():
            places = np.flatnonzero(self.left >= length)
            stands[length] = np.zeros(len(self.own), dtype=bool)
            stands[length][places] = of_length.was_marked(self.hashes.at(length, places))
        return stands

    def _follow(self, blocks: Blocks, known: dict[int, "Places"]) -> None:
        """Go on from where spans stand, as far as both texts agree: that is less than twice the length of the span."""
        overlap = 2 * max(known)
        for part, is_last in parts(blocks, overlap):
            theirs = Hashes(part)
            for length, places in known.items():
                # The next part begins with what would be cut off here.
                hashes = theirs.all(length)[: max(0, len(part) - (length if is_last else overlap) + 1)]
                for hits, ours in places.pairs(hashes):
                    self._compare(part, hits, ours)

    def _compare(self, part: np.ndarray, theirs: np.ndarray, ours: np.ndarray) -> None:
        """Note how long the longer text, from each of `theirs`, says what the texts say from the same of `ours`."""
        agreed = 0
        while ours.size:
            goes_on = (self.left[ours] > agreed) & (theirs + agreed < len(part))
            goes_on[goes_on] = self.own[ours[goes_on] + agreed] == part[theirs[goes_on] + agreed]
            if agreed >= LEAST and not goes_on.all():
                for text in np.unique(self.owner[ours[~goes_on]]).tolist():
                    self.longest[text] = max(self.longest[text], agreed)
            theirs, ours, agreed = theirs[goes_on], ours[goes_on], agreed + 1


class Known:
    """Hashes that are looked for, and which of them were found."""

    def __init__(self, hashes: np.ndarray):
        self.hashes = np.unique(hashes)
        self.found = np.zeros(len(self.hashes), dtype=bool)
        # A table of the lowest bits tells of most others at once that they are none of these.
        self._low = np.uint64((1 << (16 * len(self.hashes)).bit_length()) - 1)
        self._table = np.zeros(int(self._low) + 1, dtype=bool)
        self._table[self.hashes & self._low] = True

    def has(self, hashes: np.ndarray) -> np.ndarray:
        """Which of `hashes` are among these."""
        are = self._table[hashes & self._low]
        maybe = hashes[are]
        if maybe.size:
            are[are] = self.hashes[np.minimum(np.searchsorted(self.hashes, maybe), len(self.hashes) - 1)] == maybe
        return are

    def mark(self, hashes: np.ndarray) -> np.ndarray:
        """The same, and note that they were found."""
        are = self.has(hashes)
        self.found[np.searchsorted(self.hashes, hashes[are])] = True
        return are

    def was_marked(self, hashes: np.ndarray) -> np.ndarray:
        """Which of `hashes`, all of which are among these, were found."""
        return self.found[np.searchsorted(self.hashes, hashes)]


class Places:
    """Where spans of some length begin in the texts, to be found by their hashes."""

    def __init__(self, of: "Hashes", length: int, begins: np.ndarray):
        places = np.flatnonzero(begins)
        hashes = of.at(length, places)
        order = np.argsort(hashes, kind="stable")
        self.places, self.hashes = places[order], hashes[order]
        self.known = Known(hashes)

    def pairs(self, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every place in `hashes` with every one of these that has the same hash, about PAIRS of them at a time."""
        hits = np.flatnonzero(self.known.has(hashes))
        low, high = (np.searchsorted(self.hashes, hashes[hits], side) for side in ("left", "right"))
        ends = np.cumsum(high - low)
        first = 0
        while first < len(hits):
            before = ends[first - 1] if first else 0
            until = max(first + 1, int(np.searchsorted(ends, before + PAIRS)))
            times = (high - low)[first:until]
            within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
            yield np.repeat(hits[first:until], times), self.places[np.repeat(low[first:until], times) + within]
            first = until


class Hashes:
    """Polynomial hashes of the spans of some bytes, found by doubling."""

    def __init__(self, content: np.ndarray):
        self._of_powers = [(mix(content.astype(np.uint64) + np.uint64(FACTOR)), FACTOR)]  # spans of 1, 2, 4 ... bytes

    def all(self, length: int) -> np.ndarray:
        """Those of all spans of `length` bytes, a power of two."""
        return self._of_power(length.bit_length() - 1)[0]

    def at(self, length: int, places: np.ndarray) -> np.ndarray:
        """The hashes of the spans of `length` bytes that begin at `places`."""
        found, done = np.zeros(len(places), dtype=np.uint64), 0
        for bit in range(length.bit_length() - 1, -1, -1):
            if places.size and length >> bit & 1:
                hashes, factor = self._of_power(bit)
                found = found * np.uint64(factor) + hashes[places + done]
                done += 1 << bit
        return found

    def _of_power(self, bit: int) -> tuple[np.ndarray, int]:
        """The hashes of all spans of 2**bit bytes, and the factor of what stands before such a span."""
        while len(self._of_powers) <= bit:
            half, factor = self._of_powers[-1]
            width = 1 << len(self._of_powers) - 1
            whole = half[:-width] * np.uint64(factor) + half[width:]
            self._of_powers.append((whole, factor * factor % 2**64))
        return self._of_powers[bit]


def parts(blocks: Blocks, overlap: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The longer text in parts, and whether each is the last: each begins with the `overlap` - 1 bytes before it."""
    rest = b""
    for block in blocks():
        for first in range(0, len(block), AT_ONCE):
            content = rest + block[first : first + AT_ONCE]
            if len(content) >= overlap:
                yield np.frombuffer(content, dtype=np.uint8), False
                content = content[len(content) - overlap + 1 :]
            rest = content
    yield np.frombuffer(rest, dtype=np.uint8), True

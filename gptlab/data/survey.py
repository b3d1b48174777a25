"""What documents hold, in one reading: how long they are, which are copies, and characters that no text should have.

Of each document a hash and a length are kept, 16 bytes, and of its text nothing.
"""

import hashlib
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gptlab.data.document import Document
from gptlab.data.tokens import TokenFile
from gptlab.tokenizer import EOS_ID, N_SPECIAL, Tokenizer

BATCH_CHARACTERS = 2**19  # counted at a time
COUNTED_IDS = 2**17
EXAMPLES = 3
QUANTILES = {"shortest": 0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "longest": 1}
CODES = 0x110000
LAYOUT = "\t\n\f"  # a form feed ends a page of plain text, and stands in many a source file
# The controls of ASCII and Latin-1, halves of characters, and what tells of text that was decoded wrongly.
SUSPECT = np.zeros(CODES, dtype=bool)
SUSPECT[[*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFEFF, 0xFFFD, 0xFFFE, 0xFFFF]] = True
SUSPECT[[ord(character) for character in LAYOUT]] = False
NAMES = {0: "null", 0x0D: "carriage return", 0x1B: "escape", 0x7F: "delete", 0xFEFF: "byte-order mark"}


class Survey:
    """The figures of the documents that have passed by; lengths are in characters, or in tokens."""

    def __init__(self, unit: str):
        self.unit = unit
        self._lengths, self._hashes, self._most = array("Q"), array("Q"), -1
        self.longest = ""  # the name of the longest
        self.empty: list[str] = []  # names of the first empty ones
        self.empty_documents = 0
        self.characters = np.zeros(CODES, dtype=np.int64)  # how often each occurs; of ids, only those that are SUSPECT
        self.first: dict[int, str] = {}  # where a suspect one stands first

    def add(self, name: str, length: int, digest: bytes, is_empty: bool) -> None:
        self._lengths.append(length)
        self._hashes.append(int.from_bytes(digest, "little"))
        if length > self._most:
            self._most, self.longest = length, name
        if is_empty:
            self.empty_documents += 1
            self.empty = [*self.empty, name][:EXAMPLES]

    @property
    def documents(self) -> int:
        return len(self._lengths)

    @property
    def length(self) -> int:
        """Of all of them together."""
        return int(np.frombuffer(self._lengths, dtype=np.uint64).sum())

    @property
    def bytes(self) -> int:
        """In UTF-8; half a character counts as three."""
        widths = np.full(CODES, 4)
        widths[:0x10000], widths[:0x800], widths[:0x80] = 3, 2, 1
        return int(self.characters @ widths)

    def lengths(self) -> dict[str, Any]:
        """Quantiles, and how many documents have from 1, 10, 100 and so on up to the next of these."""
        lengths = np.frombuffer(self._lengths, dtype=np.uint64)
        if not lengths.size:
            return {"unit": self.unit}
        found = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
        limits = np.array([0, *(10**power for power in range(len(str(int(lengths.max())))))], dtype=np.uint64)
        at_least = np.searchsorted(np.sort(lengths), limits)
        counts = np.diff([*at_least, lengths.size])
        return {
            "unit": self.unit,
            **{name: int(value) for name, value in zip(QUANTILES, found, strict=True)},
            "histogram": {str(limit): int(count) for limit, count in zip(limits, counts, strict=True)},
        }

    def copies(self, names: Callable[[], Iterable[str]]) -> dict[str, Any]:
        """How many documents are copies of earlier ones, and the names of a few pairs, for which `names` is read."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        pairs = sorted((int(order[i + 1]), int(order[i])) for i in same[np.argsort(order[same + 1])[:EXAMPLES]])
        wanted = {index for pair in pairs for index in pair}
        found: dict[int, str] = {}
        for index, name in enumerate(names() if wanted else ()):
            if index in wanted:
                found[index] = name
            if len(found) == len(wanted):
                break
        return {"documents": len(same), "examples": [[found[first], found[copy]] for copy, first in pairs]}

    def suspects(self) -> list[dict[str, Any]]:
        """The characters that no text should have, the most frequent first."""
        codes = np.flatnonzero(SUSPECT & (self.characters > 0)).tolist()
        codes.sort(key=lambda code: -self.characters[code])
        return [
            {
                "character": f"U+{code:04X}",
                "name": NAMES.get(code) or unicodedata.name(chr(code), "control").lower(),
                "times": int(self.characters[code]),
                "first": self.first[code],
            }
            for code in codes
        ]


def survey_text(documents: Iterable[Document]) -> Survey:
    """Copies may differ in white space, as for data.deduplicate=exact; a document that has nothing else is empty."""
    survey, waiting = Survey("characters"), _Waiting()
    digest, length, line, is_empty = _digest(), 0, 1, True
    for document in documents:
        waiting.add(document.name, line, document.text)
        if waiting.size >= BATCH_CHARACTERS:
            waiting.count_into(survey)
        words = " ".join(document.text.split())
        if words and not is_empty:
            digest.update(b" ")
        digest.update(words.encode("utf-8", "surrogatepass"))
        length, is_empty = length + len(document.text), is_empty and not words
        if document.ends:
            survey.add(document.name, length, digest.digest(), is_empty)
            digest, length, line, is_empty = _digest(), 0, 1, True
        else:
            line += document.text.count("\n")
    waiting.count_into(survey)
    return survey


def _digest() -> Any:
    return hashlib.blake2b(digest_size=8)


class _Waiting:
    """Texts whose characters are still to be counted: many together, since each counting takes a while to begin."""

    def __init__(self):
        self.texts: list[tuple[str, int, str]] = []  # document, its first line, text
        self.size = 0

    def add(self, name: str, line: int, text: str) -> None:
        self.texts.append((name, line, text))
        self.size += len(text)

    def count_into(self, survey: Survey) -> None:
        joined = "".join(text for _, _, text in self.texts)
        counts = np.bincount(np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32))
        survey.characters[: len(counts)] += counts
        new = [code for code in np.flatnonzero((counts > 0) & SUSPECT[: len(counts)]) if code not in survey.first]
        for code in map(int, new):
            name, line, text = next(row for row in self.texts if chr(code) in row[2])
            survey.first[code] = f"{name}, line {line + text.count(chr(10), 0, text.index(chr(code)))}"
        self.texts, self.size = [], 0


def survey_ids(runs: Iterable[TokenFile], tokenizer: Tokenizer) -> Survey:
    """Of ids that are all tokens of `tokenizer`. What does not end with an end token counts as no document.

    Characters are seen where a token has the whole of them: most tokens have, and all of ASCII.
    """
    survey = Survey("tokens")
    suspects = {i: found for i in range(N_SPECIAL, tokenizer.vocab_size) if (found := _suspects_in(tokenizer, i))}
    is_suspect = np.isin(np.arange(tokenizer.vocab_size), list(suspects))

    def watch(run: TokenFile, start: int, block: np.ndarray) -> None:
        for first in range(0, len(block), COUNTED_IDS):
            part = block[first : first + COUNTED_IDS].astype(np.int64)
            places = np.flatnonzero(is_suspect[part])
            for i, times in zip(*np.unique(part[places], return_counts=True), strict=True):
                for code in suspects[int(i)]:
                    survey.characters[code] += times
                    if code not in survey.first:
                        place = start + first + int(places[np.flatnonzero(part[places] == i)[0]])
                        survey.first[code] = _place(run, place)

    for name, length, digest in documents_of(runs, watch):
        survey.add(name, length, digest, length == 0)
    return survey


def _suspects_in(tokenizer: Tokenizer, i: int) -> list[int]:
    text = tokenizer.decode_bytes([i]).decode("utf-8", "ignore")
    return [ord(character) for character in text if SUSPECT[ord(character)]]


def documents_of(
    runs: Iterable[TokenFile], watch: Callable[[TokenFile, int, np.ndarray], None] = lambda *block: None
) -> Iterator[tuple[str, int, bytes]]:
    """Name, length and hash of each document; `watch` is shown every block of ids, with the place of its first."""
    for run in runs:
        digest, length, first = _digest(), 0, 0
        for start, block in run.blocks():
            watch(run, start, block)
            content, previous = block.astype("<u4"), 0  # whatever the file's own type is
            for end in np.flatnonzero(block == EOS_ID).tolist():
                digest.update(content[previous:end].data)
                yield _place(run, first), length + end - previous, digest.digest()
                digest, length, previous, first = _digest(), 0, end + 1, start + end + 1
            digest.update(content[previous:].data)
            length += len(content) - previous


def _place(run: TokenFile, place: int) -> str:
    return f"{run.path.name}, byte {run.first_byte + place * run.dtype.itemsize:,}"

"""Text made cleaner before it is split: normal forms, short documents and copies left out."""

import hashlib
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gptlab.data.corpus import Source
from gptlab.data.document import Document
from gptlab.files import sha256_of_file

log = logging.getLogger(__name__)

SHINGLE_WORDS = 5
PERMUTATIONS = 128


@dataclass(frozen=True)
class Cleaning:
    """`normalize` is null, NFC or NFKC; `deduplicate` null, exact or near.

    "exact" leaves out a document whose text, white space aside, was there before. "near" also one whose runs of
    SHINGLE_WORDS words are, by the Jaccard measure that MinHash estimates (Broder 1997), at least `similarity` those
    of one that stays; of texts without words, only exact copies.
    """

    normalize: str | None
    min_characters: int
    deduplicate: str | None
    similarity: float

    def __post_init__(self):
        for name, words in (("normalize", ("NFC", "NFKC")), ("deduplicate", ("exact", "near"))):
            if (value := getattr(self, name)) not in (None, *words):
                raise ValueError(f"data.{name}={value!r} is none of null, {', '.join(words)}")
        if self.min_characters < 0:
            raise ValueError(f"data.min_characters={self.min_characters} must be 0 or more")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"data.similarity={self.similarity} must be more than 0 and at most 1")

    @property
    def changes_text(self) -> bool:
        return bool(self.normalize or self.min_characters or self.deduplicate)


class Cleaned(Source):
    """What `cleaning` makes of another source, whose documents are held whole, one at a time.

    Copies of what is `held_out` for validation are left out as well. What is known of the documents before grows with
    their number: 100 bytes each for "exact", 3 KB for "near".
    """

    def __init__(self, source: Source, cleaning: Cleaning, held_out: Source | None = None):
        self.source, self.cleaning, self.held_out = source, cleaning, held_out

    @property
    def bytes_read(self) -> int:
        return self.source.bytes_read

    def paths(self) -> list[Path]:
        return self.source.paths()

    def read(self, path: Path) -> Iterator[Document]:
        return self._clean(self.source.read(path))

    def documents(self) -> Iterator[Document]:
        return self._clean(self.source.documents())

    def _clean(self, documents: Iterator[Document]) -> Iterator[Document]:
        finders = {None: never, "exact": exact, "near": lambda: near(self.cleaning.similarity)}
        is_copy = finders[self.cleaning.deduplicate]()
        seen = short = copies = 0
        for document in whole(self.held_out.documents()) if self.held_out else ():
            is_copy(self._normal(document).text)
        for document in map(self._normal, whole(documents)):
            seen += 1
            if len(document.text.strip()) < self.cleaning.min_characters:
                short += 1
            elif is_copy(document.text):
                copies += 1
            else:
                yield document
        log.debug("of %d documents %d were too short and %d copies", seen, short, copies)

    def _normal(self, document: Document) -> Document:
        form = self.cleaning.normalize
        return replace(document, text=unicodedata.normalize(form, document.text)) if form else document

    @property
    def kinds(self) -> list[type]:
        return [Cleaned, *self.source.kinds]

    @property
    def settings(self) -> dict:
        settings = {"cleaning": asdict(self.cleaning), "source": self.source.settings}
        if self.held_out is not None:
            files = [[sha256_of_file(path), *self.held_out.named(path)] for path in self.held_out.paths()]
            settings["held_out"] = [self.held_out.settings, files]
        return settings

    def named(self, path: Path) -> list[str]:
        return self.source.named(path)


def whole(documents: Iterator[Document]) -> Iterator[Document]:
    """Documents that came in parts, put together."""
    parts: list[str] = []
    for document in documents:
        parts.append(document.text)
        if document.ends:
            yield document if len(parts) == 1 else replace(document, text="".join(parts), start=0, length=None)
            parts = []


IsCopy = Callable[[str], bool]


def never() -> IsCopy:
    return lambda text: False


def exact() -> IsCopy:
    """A function that tells whether a text was given to it before."""
    seen: set[bytes] = set()

    def is_copy(text: str) -> bool:
        digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = digest in seen
        seen.add(digest)
        return known

    return is_copy


def near(similarity: float) -> IsCopy:
    """A function that tells whether a text is much like one that was given to it before and was not a copy itself."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ModuleNotFoundError as error:
        raise ValueError('data.deduplicate=near takes datasketch: pip install "gptlab[data]"') from error
    index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
    kept: dict[str, MinHash] = {}
    is_exact_copy = exact()

    def is_copy(text: str) -> bool:
        if not (words := re.findall(r"\w+", text.lower())):  # nothing to compare: all such texts would be one
            return is_exact_copy(text)
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
        own = MinHash(num_perm=PERMUTATIONS, seed=1)
        own.update_batch(sorted(shingle.encode() for shingle in shingles))
        if any(own.jaccard(kept[name]) >= similarity for name in index.query(own)):  # the index only knows candidates
            return True
        name = str(len(kept))
        kept[name] = own
        index.insert(name, own)
        return False

    return is_copy

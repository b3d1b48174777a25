"""Text in batches, and what each is encoded to: the same wherever, and in however many processes, that is done."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptlab.data.document import Document
from gptlab.tokenizer import EOS_ID, UNK_ID, Tokenizer

BATCH_CHARACTERS = 2**19  # a tenth of a second for sentencepiece

Batch = list[tuple[str, str, bool]]  # side, text, and whether its document ends there


@dataclass
class Encoded:
    """One side of a batch: the bytes of its ids, and what they are of. `characters` are code points and how many."""

    content: bytes = b""
    tokens: int = 0
    unknown_tokens: int = 0
    documents: int = 0
    bytes: int = 0
    characters: list[tuple[int, int]] = field(default_factory=list)

    def sums(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "content"}


def of(pieces: Iterable[tuple[str, Document]]) -> Iterator[Batch]:
    """The pieces, each with its side, in batches of about BATCH_CHARACTERS; where they end hangs on the text alone."""
    batch: Batch = []
    size = 0
    for side, document in pieces:
        batch.append((side, document.text, document.ends))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer: Tokenizer, dtype: str, batch: Batch) -> dict[str, Encoded]:
    """What the files of ids are to have of this batch, by side."""
    sides: dict[str, Encoded] = {}
    for side in {side for side, _, _ in batch}:
        own = [(text, ends) for other, text, ends in batch if other == side]
        ids = [part for text, ends in own for part in (tokenizer.encode(text), [EOS_ID] if ends else [])]
        joined = np.concatenate([np.asarray(part, dtype=np.int64) for part in ids])
        assert joined.size == 0 or (joined.min() >= 0 and joined.max() < tokenizer.vocab_size)
        text = "".join(text for text, _ in own)
        counts = np.bincount(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32))
        found = np.flatnonzero(counts)
        sides[side] = Encoded(
            content=joined.astype(dtype).tobytes(),
            tokens=joined.size,
            unknown_tokens=int(np.count_nonzero(joined == UNK_ID)),
            documents=sum(ends for _, ends in own),
            bytes=len(text.encode("utf-8", "surrogatepass")),
            characters=list(zip(found.tolist(), counts[found].tolist(), strict=True)),
        )
    return sides

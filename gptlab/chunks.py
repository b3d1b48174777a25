"""Text in chunks, and a sample of them that keeps to a budget: 10 GB of text is learnt from in bounded memory."""

import heapq
import random
from collections.abc import Iterable, Iterator

CHUNK_CHARACTERS = 4096  # sentencepiece takes four times as long over one big string


def chunks(text: str) -> Iterator[str]:
    """`text` in pieces of at most CHUNK_CHARACTERS, cut after a line end, else before a space, else anywhere."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        limit = start + CHUNK_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or max(text.rfind(" ", start + 1, limit), 0) or limit
        yield text[start:end]
        start = end
    yield text[start:]


def sample(parts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A uniform sample of at most `max_bytes`, in order, in one pass: each part draws a lot, the lowest stay."""
    draw = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap whose top is the highest lot
    kept_bytes = 0
    for index, part in enumerate(parts):
        heapq.heappush(kept, (-draw.random(), index, part))
        kept_bytes += size(part)
        while kept_bytes > max_bytes and len(kept) > 1:  # never down to nothing
            kept_bytes -= size(heapq.heappop(kept)[2])
    return [part for _, _, part in sorted(kept, key=lambda item: item[1])]


def size(text: str) -> int:
    """Its bytes as UTF-8; a lone surrogate, which JSON can bring, counts as three."""
    return len(text.encode("utf-8", "surrogatepass"))


def training_sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """The chunks of `texts` that a tokenizer is to learn from. Raises ValueError where there is no text in them."""
    kept = sample((chunk for text in texts for chunk in chunks(text)), max_bytes, seed)
    if not any(chunk.strip() for chunk in kept):
        raise ValueError("the tokenizer's training text is empty: point data at files that hold text")
    return kept

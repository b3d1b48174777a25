"""What can be told of texts without a judge: how varied they are, how they repeat themselves, and what is copied."""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gptlab.data.tokens import TokenFile
from gptlab.evaluate.copies import Blocks, Copies
from gptlab.tokenizer import EOS_ID, Tokenizer

WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
WORD = re.compile(r"[^\W\d_]+")
HALF = bytes(range(0x80, 0xC0))  # what no character begins with in UTF-8
BETWEEN = b"\0"  # stands between documents, so that no span or word lies across two


def quality(groups: dict[str, list[str]], training: Blocks | None) -> dict[str, dict[str, Any]]:
    """The figures of each group of texts, by the same measure; those that need the training text are null without it.

    Distinct n-grams grow rarer the more text there is: each group gives as many words as the one that has fewest.
    """
    texts = [text for group in groups.values() for text in group]
    contents = [text.encode("utf-8", "surrogatepass") for text in texts]
    copies = Copies(contents, training) if training else None
    seen = words_seen({word for text in texts for word in WORD.findall(text)}, training) if training else None
    words = {name: [WORD_OR_MARK.findall(text) for text in group] for name, group in groups.items()}
    fewest = min((sum(map(len, group)) for group in words.values() if group), default=0)
    found, first = {}, 0
    for name, group in groups.items():
        own = slice(first, first := first + len(group))
        repeats = [longest_repeat(text) for text in group]
        found[name] = {
            "texts": len(group),
            "bytes": sum(map(len, contents[own])),
            **{f"distinct_{n}": distinct(words[name], n, fewest) for n in (1, 2, 3)},
            "longest_repeat_mean": mean(repeats),
            "longest_repeat_max": max(repeats, default=None),
            **copied(copies, own),
            "known_words": None if seen is None else share(w in seen for text in group for w in WORD.findall(text)),
            "replacement_characters": share(character == "\ufffd" for text in group for character in text),
        }
    return found


def copied(copies: Copies | None, own: slice) -> dict[str, Any]:
    """How much of some of the texts stands in the training text."""
    longest = copies.longest[own] if copies else []
    shares = [one for one in (copies.shares[own] if copies else []) if one is not None]
    return {
        "longest_copy_mean": mean(longest),
        "longest_copy_max": max(longest, default=None),
        "copied_50_bytes": mean(shares),
    }


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def share(hits: Iterable[bool]) -> float | None:
    return mean(list(hits))


def distinct(texts: Sequence[Sequence[str]], n: int, words: int) -> float | None:
    """The share of different n-grams among those of the first so many words (Li et al. 2016), none across texts."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        text = text[:words]
        words -= len(text)
        grams += zip(*(text[i:] for i in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else None


def longest_repeat(text: str) -> int:
    """Characters of the longest span that stands in `text` at least twice, be it overlapping."""
    low, high = 0, max(0, len(text) - 1)
    while low < high:  # where a span stands twice, so does each part of it
        length = (low + high + 1) // 2
        if repeats(text, length):
            low = length
        else:
            high = length - 1
    return low


def repeats(text: str, length: int) -> bool:
    spans = set()
    for start in range(len(text) - length + 1):
        span = text[start : start + length]
        if span in spans:
            return True
        spans.add(span)
    return False


def words_seen(words: set[str], training: Blocks) -> set[str]:
    """Which of `words` the training text has; it is read until all are seen."""
    missing, rest = set(words), b""
    for block in (*training(), BETWEEN):
        content = rest + block
        end = max(content.rfind(mark) for mark in (b" ", b"\n", BETWEEN)) + 1  # of the last whole word
        missing.difference_update(WORD.findall(content[:end].decode("utf-8", "replace")))
        if not missing:
            break
        rest = content[end:]
    return words - missing


def training_text(files: Sequence[TokenFile], tokenizer: Tokenizer) -> Blocks:
    """The text that ids stand for, in blocks."""

    def blocks() -> Iterator[bytes]:
        for file in files:
            for _, ids in file.blocks():
                documents = np.split(ids, np.flatnonzero(ids == EOS_ID))
                yield BETWEEN.join(tokenizer.decode_bytes(document) for document in documents)
            yield BETWEEN

    return blocks


def excerpts(files: Sequence[Any], tokenizer: Tokenizer, count: int, max_tokens: int) -> list[str]:
    """`count` texts from held-out ids, evenly spread: each from the start of a document, or, where there are fewer of
    these, from anywhere; up to its end, or to `max_tokens`."""
    starts = [document_starts(ids[:]) for ids in files]
    if sum(map(len, starts)) < count:
        starts = [range(len(ids)) for ids in files]
    before = np.cumsum([0, *map(len, starts)])
    count = min(count, int(before[-1]))
    texts = []
    for place in (i * int(before[-1]) // count for i in range(count)):
        file = int(np.searchsorted(before, place, side="right")) - 1
        at = int(starts[file][place - before[file]])
        ids = np.asarray(files[file][at : at + max_tokens])
        found = np.flatnonzero(ids == EOS_ID)
        content = tokenizer.decode_bytes(ids[: found[0]] if found.size else ids)
        texts.append(codecs.getincrementaldecoder("utf-8")("replace").decode(content.lstrip(HALF)))  # no half of one
    return texts


def document_starts(ids: np.ndarray) -> np.ndarray:
    """Where documents begin: after an end token, and at the start; not where nothing follows."""
    starts = np.append(0, np.flatnonzero(ids == EOS_ID) + 1)
    starts = starts[starts < len(ids)]
    return starts[ids[starts] != EOS_ID]

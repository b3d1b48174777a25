"""A document, and the bytes of a text file as text."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

GUTENBERG_START = re.compile(r"^\*{3} *START OF [^*]*PROJECT GUTENBERG[^*]*\*{3}.*\n", re.MULTILINE | re.IGNORECASE)
GUTENBERG_END = re.compile(r"^\*{3} *END OF [^*]*?PROJECT GUTENBERG", re.MULTILINE | re.IGNORECASE)
MARK = 2000  # characters: no line of START or END, with a title of many lines, is longer


class UnreadableText(ValueError):  # noqa: N818 - what a user reads is its message
    """Bytes of a file that are no text, and where they stand."""

    def __init__(self, message: str, path: Path, byte: int, line: int):
        super().__init__(message)
        self.path, self.byte, self.line = path, byte, line


@dataclass(frozen=True)
class Document:
    """A document; or, where it is too large to hold, one of its parts, which come one after another.

    A part stands at `start` of `length` characters. `length` is None where the text is all there is.
    """

    name: str
    text: str
    start: int = 0
    length: int | None = None

    @property
    def ends(self) -> bool:
        """Whether this is the last, or only, part."""
        return self.length is None or self.start + len(self.text) == self.length


def decode_text(content: bytes, path: Path, first_byte: int = 0, first_line: int = 1) -> str:
    """`content`, which stands in `path` from `first_byte` and `first_line` on, as text with LF line ends."""
    if (null := content.find(b"\0")) >= 0:
        line = first_line + content.count(b"\n", 0, null)
        raise UnreadableText(
            f"{path} is binary: byte {first_byte + null} is NUL, in line {line}; give text files only (UTF-16 text "
            "must become UTF-8: iconv -f UTF-16 -t UTF-8)",
            *(path, first_byte + null, line),
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise UnreadableText(
            f"{path} is not UTF-8: byte {first_byte + error.start} (0x{content[error.start]:02x}, line {line}) is "
            "invalid; convert it, for example with: iconv -f LATIN1 -t UTF-8",
            *(path, first_byte + error.start, line),
        ) from error
    if first_byte == 0:
        text = text.removeprefix("\ufeff")  # the byte-order mark
    # to look for two characters takes a twentieth of the time that encoding does, for one next to none
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def without_gutenberg(text: str) -> str:
    """`text` without Project Gutenberg's headers and licences; text that has none comes back unchanged."""
    spans = gutenberg_spans([text])
    return text if spans is None else "".join(gutenberg_texts([text], spans))


def gutenberg_spans(parts: Iterable[str]) -> list[tuple[int, int]] | None:
    """From where to where the books stand in a text, which may come in parts; None where it is not Gutenberg's.

    A book begins after a line of START, and ends before one of END. Where one of these is missing, more is kept.
    """
    spans, begin, is_first = [], None, True
    for start, end, begins in _gutenberg_marks(parts):
        if is_first and not begins:
            begin = 0
        if begin is not None:
            spans.append((begin, start))
        begin, is_first = end if begins else None, False
    if is_first:
        return None
    return spans if begin is None else [*spans, (begin, sys.maxsize)]


def _gutenberg_marks(parts: Iterable[str]) -> Iterator[tuple[int, int, bool]]:
    """Where each line of START or END stands, and whether it is of START. In parts, none is longer than MARK."""
    done, at, text = 0, 0, ""  # up to where marks were found; where `text` begins
    for part in parts:
        at, text = at + max(len(text) - MARK, 0), text[-MARK:] + part
        if "***" not in text:
            continue
        first = max(done - at, 1 if at else 0)  # a line may have begun before the text that is still held
        found = [(mark, True) for mark in GUTENBERG_START.finditer(text, first)]
        found += [(mark, False) for mark in GUTENBERG_END.finditer(text, first)]
        for mark, begins in sorted(found, key=lambda each: each[0].start()):
            done = at + mark.end()
            yield at + mark.start(), done, begins


def gutenberg_texts(parts: Iterable[str], spans: list[tuple[int, int]]) -> Iterator[str]:
    """What stands in `spans`, in parts: without empty lines at the ends of each, and one between two of them."""
    at, number = 0, 0
    before, waiting, has_begun = "", "", False  # what comes before the next text; of this span
    for part in parts:
        while number < len(spans) and spans[number][0] < at + len(part):
            start, end = spans[number]
            text = part[max(start - at, 0) : end - at]
            text = text if has_begun else text.lstrip("\n")
            if body := text.rstrip("\n"):
                yield (waiting if has_begun else before) + body
                before, waiting, has_begun = "\n\n", text[len(body) :], True
            else:
                waiting += text
            if end > at + len(part):
                break
            number, waiting, has_begun = number + 1, "", False
        at += len(part)
    yield "\n"

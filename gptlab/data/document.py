"""A document, and the bytes of a text file as text."""

import re
from dataclasses import dataclass
from pathlib import Path

GUTENBERG_START = re.compile(r"^\*{3} *START OF [^*]*PROJECT GUTENBERG[^*]*\*{3}.*\n", re.MULTILINE | re.IGNORECASE)
GUTENBERG_END = re.compile(r"^\*{3} *END OF [^*]*PROJECT GUTENBERG", re.MULTILINE | re.IGNORECASE)


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
    """`text` without Project Gutenberg's header and licence; text that has neither comes back unchanged."""
    start, end = GUTENBERG_START.search(text), GUTENBERG_END.search(text)
    if not (start or end):
        return text
    return text[start.end() if start else 0 : end.start() if end else None].strip("\n") + "\n"

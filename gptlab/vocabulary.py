"""What people give a vocabulary, and how they read it: domain tokens in, and out the list `vocab.tsv`.

The list stands beside each saved tokenizer, and is never read back.
"""

import re
from collections.abc import Iterable, Sequence

SPACE = "\u2423"  # the sign for a space, which would not be seen at the end of a piece
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", " ": SPACE, SPACE: "\\u2423"}


def readable(content: bytes) -> str:
    r"""`content` in characters that can be seen, no two contents alike: a space as U+2423, and \n, \xNN, \uNNNN."""
    text = content.decode("utf-8", "surrogateescape")
    return "".join(ESCAPES.get(character) or _visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is no part of a character
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def listing(rows: Iterable[tuple[int, str | None, bytes, str, float | None]]) -> str:
    """The table of (id, name or None, bytes, kind, score or None): tab-separated, a line for each id."""
    lines = ["id\tpiece\tbytes\tkind\tscore"]
    for i, name, content, kind, score in rows:
        lines.append(f"{i}\t{name or readable(content)}\t{content.hex()}\t{kind}\t{'' if score is None else score}")
    return "\n".join(lines) + "\n"


def checked_domain_tokens(tokens: Sequence[str] | None, special_tokens: Sequence[str]) -> list[str]:
    """`tokens` as a list. Raises ValueError for one that is blank, comes twice, or is a special token."""
    tokens = list(tokens or ())
    for token in tokens:
        if fault := _fault_of(token, tokens, special_tokens):
            raise ValueError(f"tokenizer.domain_tokens={tokens}: {token!r} {fault}")
    return tokens


def _fault_of(token: str, tokens: Sequence[str], special_tokens: Sequence[str]) -> str | None:
    if not token.strip():
        return "is empty or blank; leave it out"
    if token in special_tokens:
        return "is a special token, which text cannot spell; leave it out"
    if tokens.count(token) > 1:
        return "comes twice; leave one out"
    return (
        "holds half a surrogate pair, which is no text; leave it out" if re.search("[\ud800-\udfff]", token) else None
    )

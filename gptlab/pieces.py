"""Sentencepiece models that lose nothing: learning one of chunks of text, and encoding with it word by word."""

import io
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import sentencepiece

from gptlab.chunks import CHUNK_CHARACTERS, chunks

SPACE = "\u2581"  # sentencepiece's sign for a space: the one character its pieces cannot spell
RESERVED = re.compile(f"[{SPACE}\u2585]|<0x[0-9A-F]{{2}}>")  # with that for the unknown, and its names of bytes
REMEDIES = {  # by sentencepiece's message
    r"size too high.*<= (\d+)": "the largest possible for this text is {}; lower it, or give more text",
    r"size is smaller.* vs (\d+)": "the smallest possible for this text is {}; raise it, or lower character_coverage",
}


# The ends of words, over which no piece goes: before a space that follows none, and where letters, digits and all else
# meet, as sentencepiece cuts text before it learns; of a vocabulary with other pieces, the first of these alone.
WORDS = (re.compile(r" *(?:[^\W\d_]+|\d|(?:(?! )[\W_])+)| +"), re.compile(r" *[^ ]+| +"))
MOST_CHARACTERS = 2**20  # of words whose ids are kept: about 40 MB


class Words:
    """The ids of text by a BPE `model`, word by word, most of which have come before.

    Merges on one side of a place that no piece goes over do not depend on what stands on the other: these are the ids
    of the text in one piece.
    """

    def __init__(self, model: sentencepiece.SentencePieceProcessor, pattern: re.Pattern):
        self.model, self.pattern = model, pattern
        self.known: dict[str, list[int]] = {}
        self.characters = 0

    def encode(self, text: str) -> Iterator[int]:
        words = self.pattern.findall(text)
        if self.characters > MOST_CHARACTERS:
            self.known, self.characters = {}, 0
        known = self.known  # what this call goes by, whatever another thread puts in its place
        new = [word for word in dict.fromkeys(words) if word not in known]
        known.update(zip(new, self.model.encode(new), strict=True))
        self.characters += sum(map(len, new))
        return chain.from_iterable(map(known.__getitem__, words))


def encoder(model: sentencepiece.SentencePieceProcessor, is_bpe: bool) -> Callable[[str], Iterator[int]]:
    """What makes ids of text: by words, if it is BPE and its pieces keep to them, else by chunks.

    The scores of unigram models, which are quick, are sums: cut elsewhere, they could differ in the last digit.
    """
    special = [model.is_control(i) or model.is_unknown(i) or model.is_byte(i) for i in range(model.vocab_size())]
    pieces = [model.id_to_piece(i).replace(SPACE, " ") for i, is_special in enumerate(special) if not is_special]
    for pattern in WORDS if is_bpe else ():
        if all(len(pattern.findall(piece)) == 1 for piece in pieces):
            return Words(model, pattern).encode
    return lambda text: chain.from_iterable(map(model.encode, chunks(text)))


def learn(
    parts: list[str],
    special_tokens: Sequence[str],
    domain_tokens: Sequence[str],
    *,
    vocab_size: int,
    model_type: str,
    character_coverage: float,
) -> bytes:
    """The model learnt from `parts`, whose first ids are `special_tokens`: <unk>, <s>, </s> and <pad> first of all.

    Raises ValueError, with the nearest possible size, for a `vocab_size` that this text does not give.
    """
    if taken := [token for token in domain_tokens if RESERVED.search(token)]:
        raise ValueError(
            f"tokenizer.domain_tokens: {taken[0]!r} is, or holds, a sign of sentencepiece's own; use tokenizer=hf"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts),  # files would be cut into lines, and their line ends lost
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars="\n\t",  # a chunk's last line end is dropped in training
            pad_id=3,  # <unk>, <s> and </s> are 0, 1 and 2 unless told otherwise
            control_symbols=list(special_tokens[4:]),
            user_defined_symbols=[token.replace(" ", SPACE) for token in domain_tokens],
            max_sentence_length=4 * CHUNK_CHARACTERS,  # in bytes; a longer one would be skipped
            num_threads=4,  # fixed: it changes the last digits of a unigram model's scores
            minloglevel=2,
        )
    except RuntimeError as error:
        for message, remedy in REMEDIES.items():
            if found := re.search(message, str(error)):
                raise ValueError(f"tokenizer.vocab_size={vocab_size}: {remedy.format(found[1])}") from error
        raise
    return model.getvalue()


KINDS = (
    "",
    "normal",
    "unknown",
    "control",
    "domain",
    "unused",
    "byte",
)  # what a piece may be, by sentencepiece's number
MODEL_TYPES = ("", "unigram", "bpe", "word", "char")


class Piece(NamedTuple):
    text: str  # a space is SPACE
    score: float
    kind: str


def contents(model: bytes) -> tuple[str, list[Piece]]:
    """The type of a sentencepiece model, and its pieces in the order of their ids; the processor tells only some of it.

    A model is a message of protocol buffers: field 1 is a piece, each time it comes, with 1 its text, 2 its score and 3
    its kind; field 2 tells how it was trained, with 3 its type.
    """
    pieces, model_type = [], 1
    for number, value in _fields(model):
        if number == 1:
            found = dict(_fields(value))
            (score,) = struct.unpack("<f", found.get(2, bytes(4)))
            pieces.append(Piece(found.get(1, b"").decode(), score, KINDS[found.get(3, 1)]))
        elif number == 2:
            model_type = dict(_fields(value)).get(3, 1)
    return MODEL_TYPES[model_type], pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: their numbers, and their values as whole numbers or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        value, at = _varint(message, at) if kind in (0, 2) else ({1: 8, 5: 4}[kind], at)
        if kind:  # so many bytes
            value, at = message[at : at + value], at + value
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at

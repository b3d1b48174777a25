"""gptlab's tokenizers as a tokenizer.json: the same ids for any text, by the library `tokenizers`.

What differs is what a text may spell. Here "<|user|>" in a document is eight characters; a program that reads
tokenizer.json takes it for the token, unless it is asked not to (`split_special_tokens=True`).
"""

import base64
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from gptlab.borrowed import BYTE_OF, PATTERNS, HuggingFaceTokenizer, TiktokenTokenizer, without_frills
from gptlab.pieces import SPACE, Piece, contents
from gptlab.tokenizer import (
    EOS_ID,
    N_SPECIAL,
    SPECIAL_TOKENS,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from gptlab.words import WordTokenizer

CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FUSE = {"type": "Fuse"}
SPELLING = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, FUSE]}  # bytes to characters, and no spaces
NEVER = -1e9  # the score of what no text may become: any other way to spell it is better


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. Raises ValueError for a tokenizer that it cannot express."""
    kind = type(tokenizer)
    if kind not in MAKERS:
        raise ValueError(
            f"no tokenizer.json does what {kind.__module__}.{kind.__qualname__} does; there is one for "
            f"{', '.join(each.__name__ for each in MAKERS)}"
        )
    return MAKERS[kind](tokenizer)


def special_names(tokenizer: Tokenizer) -> list[str]:
    """What the special tokens are called in tokenizer.json: other names, where a foreign vocabulary has theirs."""
    if not isinstance(tokenizer, HuggingFaceTokenizer | TiktokenTokenizer) or not getattr(tokenizer, "shift", 1):
        return list(tokenizer.special_tokens)
    taken = {name for name, _ in foreign_pieces(tokenizer)}
    return [name if name not in taken else f"<|gptlab:{name.strip('<|>')}|>" for name in tokenizer.special_tokens]


def foreign_pieces(tokenizer: HuggingFaceTokenizer | TiktokenTokenizer) -> list[tuple[str, int]]:
    """The names and ids that another library's vocabulary has of its own."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return [(byte_name(piece), i) for piece, i in ranks(tokenizer)]
    content = json.loads(tokenizer.json)
    added = [(token["content"], token["id"]) for token in content["added_tokens"]]
    return [*content["model"]["vocab"].items(), *added]


def assembled(
    tokenizer: Tokenizer,
    model: dict[str, Any],
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    domain: Iterable[str] = (),
) -> dict[str, Any]:
    """A whole tokenizer.json, in which each text begins with the end of the one before.

    `domain` are the tokens that are cut out of a text before `model` sees it.
    """
    names = special_names(tokenizer)
    added = [added_token(i, name, special=True) for i, name in enumerate(names)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added + [added_token(model["vocab"][name], name, special=False) for name in domain],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": begin_with(names[EOS_ID]),
        "decoder": decoder,
        "model": model,
    }


def added_token(i: int, name: str, special: bool) -> dict[str, Any]:
    return {"id": i, "content": name, "special": special} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )


def begin_with(token: str) -> dict[str, Any]:
    """The post-processor that puts `token`, whose id is EOS_ID, before a text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [EOS_ID], "tokens": [token]}},
    }


def bpe(vocab: dict[str, int], merges: Sequence[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    settings = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    settings |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE"} | settings | changes | {"vocab": vocab, "merges": [list(pair) for pair in merges]}


def every_cut(pieces: Iterable[str], known: set[str]) -> list[tuple[str, str]]:
    """All ways to make each piece of two others. Who merges by the piece that comes of it knows no pairs."""
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


# Sentencepiece. Its sign for a space, which it cannot spell, is not used here: a space is a space.


def of_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    model_type, pieces = contents(tokenizer.model)
    if model_type not in ("bpe", "unigram"):
        raise ValueError(f"no tokenizer.json does what a sentencepiece model of type {model_type} does")
    if model_type == "bpe":
        domain = [spelt(piece) for piece in pieces if piece.kind == "domain"]
        return assembled(tokenizer, sentencepiece_bpe(pieces), None, SPELLING, domain)
    return assembled(tokenizer, sentencepiece_unigram(pieces), apart(unspellable(pieces)), SPELLING)


def spelt(piece: Piece) -> str:
    return piece.text.replace(SPACE, " ") if piece.kind in ("normal", "domain") else piece.text


def sentencepiece_bpe(pieces: list[Piece]) -> dict[str, Any]:
    normal = [piece for piece in pieces if piece.kind == "normal"]
    ordered = [spelt(piece) for piece in sorted(normal, key=lambda piece: -piece.score)]  # the best merge first
    vocab = {spelt(piece): i for i, piece in enumerate(pieces)}
    return bpe(vocab, every_cut(ordered, set(ordered)), unk_token=pieces[0].text, fuse_unk=True, byte_fallback=True)


def sentencepiece_unigram(pieces: list[Piece]) -> dict[str, Any]:
    best = max(piece.score for piece in pieces if piece.kind == "normal")

    def score(piece: Piece) -> float:
        if piece.kind == "domain":  # as sentencepiece has it
            return len(piece.text.encode()) * best - 0.1
        return piece.score if piece.kind == "normal" else NEVER

    vocab = [[spelt(piece), score(piece)] for piece in pieces]
    return {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}


def unspellable(pieces: list[Piece]) -> set[str]:
    """Characters that are no pieces, of names that are: where they stand apart, no text can spell "<s>" or "<0x41>"."""
    known = {spelt(piece) for piece in pieces if piece.kind in ("normal", "domain")}
    return {character for piece in pieces if spelt(piece) not in known for character in piece.text} - set(
        "".join(known)
    )


def apart(characters: set[str]) -> dict[str, Any] | None:
    if not characters:
        return None
    return split(f"[{''.join(map(escaped, sorted(characters)))}]")


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# Bytes, characters and words


def of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    vocab = {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    vocab |= {CHARACTER_OF[byte]: N_SPECIAL + byte for byte in range(256)}
    return assembled(tokenizer, bpe(vocab, []), BYTE_LEVEL, BYTE_LEVEL)


def of_characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    vocab = {name: i for i, name in enumerate((*SPECIAL_TOKENS, *tokenizer.characters))}
    return assembled(tokenizer, bpe(vocab, [], unk_token=SPECIAL_TOKENS[0]), None, FUSE)


def of_words(tokenizer: WordTokenizer) -> dict[str, Any]:
    words = [*SPECIAL_TOKENS, *tokenizer.domain_tokens, *tokenizer.words]
    model = {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(words)}, "unk_token": SPECIAL_TOKENS[0]}
    runs = sorted((word for word in tokenizer.words if word.isspace() and len(word) > 1), key=len, reverse=True)
    known = "|".join("".join(map(escaped, run)) for run in runs)
    white, in_words = of_python(r"\s"), of_python(r"\w")
    whole = f"(?<![{white}])(?:{known})(?![{white}])|" if runs else ""  # an unknown run is spelt one by one
    pattern = f"{whole}[{white}]|[{in_words}]+|[^{white}{in_words}]"
    return assembled(tokenizer, model, split(pattern), FUSE, tokenizer.domain_tokens)


@cache
def of_python(pattern: str) -> str:
    """The characters that Python finds by `pattern`, as ranges.

    The library's own classes take in others, such as marks, and know another version of Unicode.
    """
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    spans = (found.group() for found in re.finditer(f"(?:{pattern})+", every))
    return "".join(f"{escaped(span[0])}-{escaped(span[-1])}" for span in spans)


def escaped(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"


# Other libraries' byte-level BPE


def of_tokenizer_json(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    content = without_frills(json.loads(tokenizer.json))
    names = special_names(tokenizer)
    if tokenizer.shift:
        model = content["model"]
        if not isinstance(model["vocab"], dict):
            raise ValueError(f"the ids of a tokenizer.json with a {model.get('type')} model cannot be moved up")
        moved = {name: i + tokenizer.shift for name, i in model["vocab"].items()}
        own = {name: i for i, name in enumerate(names)}
        content["model"] = model | {"vocab": own | moved}
        added = [token | {"id": token["id"] + tokenizer.shift} for token in content["added_tokens"]]
        content["added_tokens"] = [*(added_token(i, name, special=True) for i, name in enumerate(names)), *added]
    return content | {"post_processor": begin_with(names[EOS_ID]), "decoder": content.get("decoder") or BYTE_LEVEL}


def byte_name(content: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in content)


def ranks(tokenizer: TiktokenTokenizer) -> list[tuple[bytes, int]]:
    """The pieces of a vocabulary of OpenAI's and their own ids, in the order of these."""
    lines = (line.split() for line in tokenizer.ranks.splitlines() if line)
    return sorted(((base64.b64decode(piece), int(rank)) for piece, rank in lines), key=lambda row: row[1])


def of_tiktoken(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    pieces = [byte_name(piece) for piece, _ in ranks(tokenizer)]
    vocab = {name: i for i, name in enumerate(special_names(tokenizer))}
    vocab |= {byte_name(piece): i + N_SPECIAL for piece, i in ranks(tokenizer)}
    model = bpe(vocab, every_cut(pieces, set(pieces)), ignore_merges=True)  # what is a piece is not made of others
    cut = {"type": "Sequence", "pretokenizers": [split(PLAIN_PATTERNS[tokenizer.name]), BYTE_LEVEL]}
    return assembled(tokenizer, model, cut, BYTE_LEVEL)


def plain(pattern: str) -> str:
    """A pattern of tiktoken in another dialect: nothing is possessive, and the end of the text is written otherwise."""
    return re.sub(r"([+?*]|\{\d,\d\})\+", r"\1", pattern).replace("$", r"\z")


PLAIN_PATTERNS = {name: plain(pattern) for name, pattern in PATTERNS.items()}
MAKERS: dict[type[Tokenizer], Callable[[Any], dict[str, Any]]] = {
    SentencePieceTokenizer: of_sentencepiece,
    ByteTokenizer: of_bytes,
    CharTokenizer: of_characters,
    WordTokenizer: of_words,
    HuggingFaceTokenizer: of_tokenizer_json,
    TiktokenTokenizer: of_tiktoken,
}

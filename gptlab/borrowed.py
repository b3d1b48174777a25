"""Tokenizers of other libraries, HuggingFace's and OpenAI's, all of them byte-level BPE.

gptlab's special tokens are ids 0 to 12 in these too. What was made elsewhere keeps its order behind them: its id i is
i + 13 here. Its own special tokens keep their ids and never come out of text.
"""

import base64
import hashlib
import importlib
import os
import re
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from json import dumps, loads
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

from gptlab.chunks import training_sample
from gptlab.tokenizer import N_SPECIAL, SPECIAL_TOKENS, UNK_ID, Tokenizer, as_text, checked_ids
from gptlab.vocabulary import checked_domain_tokens

LARGEST = 2**24  # vocabulary that is believed
PART = 2**16  # characters from which on a text is encoded in parts
_LINE_START = re.compile(r"(?<=\S)\n(?=[^\s/])")  # known patterns cut there too, so ids stay as they are
_STRAY = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as `as_text` writes them
_PROBES = ("a b", "  A\n\n b\t 12\u00c9e\u0301\u212b\ufb01 ")  # changed by every normalizer, and by an added space
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# GPT-2's characters for bytes, in the order of its first 256 ids: its own where it can be seen, else U+0100 and on
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f'this tokenizer needs {name} ({error}): pip install "gptlab[data]"') from error


def _parts(text: str) -> Iterator[str]:
    """`text` in parts of PART to 2 * PART characters, cut at the start of a line where there is one, else anywhere."""
    start = 0
    while len(text) - start > 2 * PART:
        found = _LINE_START.search(text, start + PART, start + 2 * PART)
        end = found.end() if found else start + 2 * PART
        yield text[start:end]
        start = end
    yield text[start:]


class ByteLevelTokenizer(Tokenizer):
    """What both have in common: every byte is a token, so that any bytes can be spelt."""

    def _know(self, content: Mapping[int, bytes], shift: int) -> None:
        """Take the bytes of each id, to which `shift` is added here; an id without bytes is a special token."""
        if out := [i for i in content if not 0 <= i < LARGEST]:
            raise ValueError(f"its id {out[0]} does not lie in 0 to {LARGEST:,}: it is damaged")
        content = {i + shift: one for i, one in content.items()}
        self._bytes_of_id = [content.get(i, b"") for i in range(max(content, default=0) + 1)]
        self._id_of_byte = {one[0]: i for i, one in content.items() if len(one) == 1}
        if missing := 256 - len(self._id_of_byte):
            raise ValueError(f"{missing} of the 256 bytes are no token of it, so text would be lost; use another")
        broken = [i for i, one in content.items() if not _is_text(one)]
        self.spelling_ids = frozenset([UNK_ID, *broken])

    @abstractmethod
    def _encode(self, text: str) -> Sequence[int]:
        """The ids of `text`, which holds no surrogates."""

    @property
    def vocab_size(self) -> int:
        return len(self._bytes_of_id)

    def encode(self, text: str | bytes) -> np.ndarray:
        text = as_text(text)
        ids: list[int] = []
        for part in [text] if self.loses else _parts(text):  # what adds a space before a text would before each part
            for i, piece in enumerate(_STRAY.split(part)):
                if i % 2:  # split() with a group puts what it matched at the odd places
                    ids += [self._id_of_byte[byte] for byte in piece.encode("utf-8", "surrogateescape")]
                elif piece:
                    ids += self._encode(piece)
        return np.array(ids, dtype=np.int32)

    def decode_bytes(self, ids) -> bytes:
        return b"".join([self._bytes_of_id[i] for i in checked_ids(ids, self.vocab_size).tolist()])


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
        return True
    except UnicodeDecodeError:
        return False


class HuggingFaceTokenizer(ByteLevelTokenizer):
    """A byte-level `tokenizer.json`, read or trained. Added tokens that are not special are found in text, and are
    domain tokens here."""

    def __init__(self, json: bytes, settings: Mapping | None = None):
        super().__init__(settings)
        self.json = json
        library = _library("tokenizers")
        try:
            content = loads(json)
            added = {token["id"]: token for token in content["added_tokens"]}
            self._tokenizer = library.Tokenizer.from_str(dumps(without_frills(content)))
        except Exception as error:  # the library raises this very class
            raise ValueError(f"not a tokenizer.json that tokenizers can read, or a damaged one ({error})") from error
        self._tokenizer.encode_special_tokens = True  # they are text, where text holds them
        names = {i: name for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        special = [names.get(i) if added.get(i, {}).get("special") else None for i in range(N_SPECIAL)]
        self.shift = 0 if tuple(special) == SPECIAL_TOKENS else N_SPECIAL  # by which its ids are moved up
        if "ByteLevel" not in _types(content.get("pre_tokenizer")):
            raise ValueError(
                f"its pieces are not made of bytes (a {content['model'].get('type')} model), so text would be lost; "
                "use a byte-level tokenizer.json, as GPT-2's, Llama 3's or Qwen's, or a sentencepiece model"
            )
        self.domain_tokens = tuple(token["content"] for token in added.values() if not token["special"])
        self._know({i: _content(name, added.get(i)) for i, name in names.items()}, self.shift)
        for token in added.values():
            if token["special"] and not all(self._bytes_of_id[i] for i in self._encode(token["content"])):
                raise ValueError(f"text can spell its special token {token['content']!r}, so it would be lost")

    @classmethod
    def from_file(cls, path: Path) -> Self:
        return cls(path.read_bytes())

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        max_train_bytes: int,
        domain_tokens: list[str] | None = None,
        seed: int = 0,
    ) -> Self:
        """Learn `vocab_size` tokens as GPT-2's were, specials included, from at most `max_train_bytes` of `texts`."""
        library = _library("tokenizers")
        domain = checked_domain_tokens(domain_tokens, cls.special_tokens)
        kept = training_sample(texts, max_train_bytes, seed)
        if domain:  # not learnt a second time
            apart = re.compile("|".join(map(re.escape, sorted(domain, key=len, reverse=True))))
            kept = [part for chunk in kept for part in apart.split(chunk)]
        new = [token for token in domain if len(token.encode()) > 1]  # one byte is a token already
        smallest = N_SPECIAL + 256 + len(new)
        if vocab_size < smallest:
            raise ValueError(f"tokenizer.vocab_size={vocab_size}: the smallest for any text is {smallest}; raise it")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - len(new),
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(kept, trainer)
        tokenizer.add_tokens([library.AddedToken(token, normalized=False) for token in domain])
        if (largest := tokenizer.get_vocab_size()) < vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size}: the largest possible for this text is {largest}; lower it, or "
                "give more text"
            )
        used = {"vocab_size": vocab_size, "max_train_bytes": max_train_bytes, "seed": seed, "domain_tokens": domain}
        return cls(tokenizer.to_str().encode(), used)

    def _encode(self, text: str) -> Sequence[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i + self.shift for i in ids] if self.shift else ids

    @cached_property
    def loses(self) -> str:
        self.__dict__["loses"] = ""  # for `encode`, which asks
        for probe in _PROBES:
            if (found := self.decode(self.encode(probe))) != probe:
                return f"what its normalizer changes: {probe!r} comes back as {found!r}"
        return ""

    def data(self) -> dict[str, object]:
        return {"json": self.json}

    def _meaning(self) -> object:
        return without_frills(loads(self.json))  # however it is laid out


def without_frills(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json but for what adds to ids, cuts them, draws lots, or swallows spaces about a token."""
    added = [token | {"lstrip": False, "rstrip": False} for token in content["added_tokens"]]
    off = {"truncation": None, "padding": None, "post_processor": None}
    return content | off | {"added_tokens": added, "model": content["model"] | {"dropout": None}}


def _types(node: Any) -> set[str]:
    """The types of a node of tokenizer.json, and of the parts of a sequence."""
    parts = (node or {}).get("pretokenizers", ())
    return {(node or {}).get("type", "")}.union(*map(_types, parts))


def _content(name: str, added: Mapping[str, Any] | None) -> bytes:
    if added is not None:
        return b"" if added["special"] else name.encode()
    if foreign := [character for character in name if character not in BYTE_OF]:
        raise ValueError(f"its piece {name!r} is not made of bytes: {foreign[0]!r} stands for none; use another")
    return bytes(BYTE_OF[character] for character in name)


_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
PATTERNS = {  # how text is cut before pieces are looked for, by name
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base"), _GPT2_PATTERN),
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
}
_ORIGIN = "https://openaipublic.blob.core.windows.net/"


class TiktokenTokenizer(ByteLevelTokenizer):
    """A vocabulary of OpenAI's, of a file that is at hand: nothing is downloaded. `ranks` has a line for each piece,
    its bytes in base64 and its id."""

    def __init__(self, ranks: bytes, name: str, settings: Mapping | None = None):
        super().__init__(settings)
        if name not in PATTERNS:
            raise ValueError(f"tokenizer.name={name!r} is none of {', '.join(PATTERNS)}")
        self.ranks, self.name = ranks, name
        try:
            pairs = [line.split() for line in ranks.splitlines() if line]
            rank_of = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in pairs}
        except ValueError as error:
            raise ValueError(f"not a file of ranks, a line '<base64> <id>' for each piece ({error})") from error
        if len(piece_of := {rank: piece for piece, rank in rank_of.items()}) < len(pairs):
            raise ValueError("not a file of ranks: a piece or an id comes twice")
        self._know(piece_of, N_SPECIAL)
        library = _library("tiktoken")
        self._encoding = library.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=rank_of, special_tokens={})

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The tokenizer in a file whose name says which it is: gpt2.tiktoken, say, or GPT-2's own vocab.bpe."""
        if path.suffix != ".bpe" and path.stem not in PATTERNS:
            known = ", ".join(f"{name}.tiktoken" for name in PATTERNS)
            raise ValueError(f"its name does not say how to cut text: call it one of {known}")
        name = path.stem if path.stem in PATTERNS else "gpt2"
        content = path.read_bytes()
        return cls(_ranks_of_merges(content) if path.suffix == ".bpe" else content, name, {"name": name})

    @classmethod
    def train(cls, texts: Iterable[str] = (), *, name: str) -> Self:
        """Nothing to learn: the vocabulary `name`, from the first place that has its file."""
        if name not in PATTERNS:
            raise ValueError(f"tokenizer.name={name!r} is none of {', '.join(PATTERNS)}")
        places = list(_places(name))
        if (found := next((place for place in places if place.is_file()), None)) is None:
            raise ValueError(
                f"tokenizer.name={name}: its file is not at hand, and none is downloaded; give tokenizer.path=<folder>/"
                f"{name}.tiktoken, or have tiktoken fetch it once: python -c 'import tiktoken; "
                f'tiktoken.get_encoding("{name}")\' (pip install "gptlab[data]"). Looked for:\n'
                + "\n".join(map(str, places))
            )
        content = found.read_bytes()
        try:
            return cls(_ranks_of_merges(content) if content.startswith(b"#version") else content, name, {"name": name})
        except ValueError as error:
            raise ValueError(f"{found}: {error}") from error

    def _encode(self, text: str) -> Sequence[int]:
        return [i + N_SPECIAL for i in self._encoding.encode_ordinary(text)]

    def data(self) -> dict[str, object]:
        return {"ranks": self.ranks, "name": self.name}

    def _meaning(self) -> object:
        return [self.ranks, PATTERNS[self.name]]


def _places(name: str) -> Iterator[Path]:
    """Where the file of a vocabulary may lie: the folder of data, then where tiktoken keeps what it has fetched."""
    if folder := os.environ.get("GPTLAB_DATA_DIR"):
        yield from (Path(folder) / file for file in (f"{name}.tiktoken", *["vocab.bpe"] * (name == "gpt2")))
    kept = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    file = "gpt-2/encodings/main/vocab.bpe" if name == "gpt2" else f"encodings/{name}.tiktoken"
    folder = Path(kept or Path(tempfile.gettempdir()) / "data-gym-cache")
    yield folder / hashlib.sha1(f"{_ORIGIN}{file}".encode()).hexdigest()


def _ranks_of_merges(content: bytes) -> bytes:
    """A vocab.bpe as ranks: 256 bytes, and then a piece for each merge."""
    try:
        pairs = [line.split() for line in content.decode().splitlines() if line and not line.startswith("#version")]
        merged = [bytes(BYTE_OF[character] for character in first + second) for first, second in pairs]
    except (ValueError, KeyError) as error:
        raise ValueError(f"not a vocab.bpe, a line '<piece> <piece>' for each merge ({error!r})") from error
    pieces = [*(bytes([byte]) for byte in BYTE_OF.values()), *merged]
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))

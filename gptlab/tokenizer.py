"""Text to token ids and back: one interface, three kinds, and the special tokens, declared here and nowhere else.

A special token's id never comes out of text, whatever a user types: "<|user|>" in a document is eight characters.
Only code that calls `special_id` can put one into a sequence. Sentencepiece and byte tokenizers are lossless: any
text and any bytes come back exactly.
"""

import hashlib
import heapq
import io
import json
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import Self

import numpy as np
import sentencepiece
import torch

from gptlab.names import load_class

# Ids 0.. in this order in every tokenizer: sentencepiece's own four, then the marks of dialogue and tool calls.
SPECIAL_TOKENS: tuple[str, ...] = (
    *("<unk>", "<s>", "</s>", "<pad>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
N_SPECIAL = len(SPECIAL_TOKENS)

FORMAT = 1  # of `state` and of the saved file; to be raised whenever they or SPECIAL_TOKENS change
SIDECAR = "gptlab_tokenizer.json"


class Tokenizer(ABC):
    """What the rest of gptlab asks of a tokenizer. A new kind needs the abstract methods and a dotted name."""

    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    _spelling_ids = frozenset([UNK_ID])  # ids that stand in for characters outside the vocabulary

    def __init__(self, settings: Mapping | None = None):
        self.settings = dict(settings or {})  # what it was built with, as plain types: a record, no input to encode

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """The int32 ids of `text`, without BOS or EOS."""

    @abstractmethod
    def decode_bytes(self, ids) -> bytes:
        """The bytes that `ids` stand for; special ids give none. Tokens may end inside a UTF-8 character."""

    def data(self) -> dict[str, object]:
        """The constructor's arguments besides `settings`, as plain types and bytes."""
        return {}

    @classmethod
    @abstractmethod
    def train(cls, texts: Iterable[str], **settings) -> Self:
        """Build a tokenizer from `texts`, training documents that are read once."""

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special_id(self, token: str) -> int:
        if token not in self.special_tokens:
            raise ValueError(f"{token!r} is no special token; this tokenizer has {', '.join(self.special_tokens)}")
        return self.special_tokens.index(token)

    def coverage(self, counts: Mapping[str, int]) -> float:
        """The share of characters, weighted by their `counts`, that the vocabulary holds whole."""
        native = (
            n for character, n in counts.items() if self._spelling_ids.isdisjoint(self.encode(character).tolist())
        )
        return sum(native) / max(sum(counts.values()), 1)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the meaning of every id: equal fingerprints encode and decode alike."""
        meaning = [_dotted_name(self), self.special_tokens, self._meaning()]
        return hashlib.sha256(json.dumps(meaning, sort_keys=True, default=bytes.hex).encode()).hexdigest()

    def _meaning(self) -> object:
        """All that encode and decode depend on, as plain types and bytes."""
        return self.data()

    def state(self) -> dict:
        """The whole tokenizer as plain types and uint8 tensors, for a checkpoint."""
        data = self.data()
        tensors = {k: torch.tensor(list(v), dtype=torch.uint8) for k, v in data.items() if type(v) is bytes}
        return {
            "format": FORMAT,
            "class": _dotted_name(self),
            "fingerprint": self.fingerprint,
            "special_tokens": list(self.special_tokens),
            "settings": self.settings,
            "data": data | tensors,
        }

    @classmethod
    def from_state(cls, state: Mapping, trust: tuple[str, ...] = ()) -> Self:
        """The tokenizer that gave `state`. Raises ValueError for another format, a foreign class, or damage."""
        if state.get("format") != FORMAT:
            raise ValueError(f"tokenizer format {state.get('format')!r} is unknown; this gptlab reads format {FORMAT}")
        try:
            data = {k: bytes(v.tolist()) if isinstance(v, torch.Tensor) else v for k, v in state["data"].items()}
            tokenizer = load_class(state["class"], cls, trust)(**data, settings=state["settings"])
            recorded = state["fingerprint"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"damaged tokenizer: {error!r}") from error
        if tokenizer.fingerprint != recorded:
            raise ValueError(f"damaged tokenizer: its fingerprint is {tokenizer.fingerprint}, recorded was {recorded}")
        return tokenizer

    def save(self, folder: Path) -> None:
        """Write `state` to `folder`: a JSON file, last, and beside it `tokenizer.<key>` for each bytes of `data`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = dict(self.data())
        files = sorted(key for key, value in data.items() if type(value) is bytes)
        for key in files:
            _write(folder / f"tokenizer.{key}", data.pop(key))
        state = self.state() | {"data": data, "files": files}
        _write(folder / SIDECAR, json.dumps(state, indent=1, sort_keys=True).encode())


tokenizer_from_state = Tokenizer.from_state


def load_tokenizer(path: str | Path, trust: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer saved at `path`: its folder, the JSON file in it, a run folder, or a bare sentencepiece model.

    A bare model must be lossless and have `<unk> <s> </s> <pad>` as ids 0 to 3. Raises ValueError for anything else.
    """
    path = Path(path)
    places = [path / SIDECAR, path / "tokenizer" / SIDECAR] if path.is_dir() else [path]
    if (file := next((place for place in places if place.is_file()), None)) is None:
        raise ValueError(f"no tokenizer at {path}: give tokenizer.path a run, or a tokenizer folder or file")
    try:
        if file.suffix != ".json":
            return SentencePieceTokenizer(file.read_bytes())
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("data"), dict):
            raise ValueError("it does not hold a tokenizer")
        for key in state.get("files", ()):
            if not key.isidentifier():  # the key becomes a file name: it must stay in this folder
                raise ValueError(f"damaged tokenizer: {key!r} names no file of its own")
            state["data"][key] = file.with_name(f"tokenizer.{key}").read_bytes()
        return Tokenizer.from_state(state, trust)
    except (ValueError, OSError) as error:
        remedy = "; it is damaged: restore it, or name another" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{file}: {error}{remedy}") from error


def _dotted_name(tokenizer: Tokenizer) -> str:
    return f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"


def _write(path: Path, content: bytes) -> None:
    """Write all of `content` or nothing: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _checked_ids(ids, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not all lie in the vocabulary of {vocab_size}")
    return ids


def _text(text: str | bytes) -> str:
    """`text` as a str in which bytes that are no UTF-8 are U+DC80 to U+DCFF, Python's "surrogateescape"."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "surrogateescape")
    # any other lone surrogate, such as the JSON "\\ud800", stands for no bytes at all
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)


class ByteTokenizer(Tokenizer):
    """Every byte is a token. Nothing to train, nothing unknown, and the longest sequences; coverage is 1."""

    vocab_size = N_SPECIAL + 256

    @classmethod
    def train(cls, texts: Iterable[str] = ()) -> Self:
        return cls()

    def encode(self, text: str | bytes) -> np.ndarray:
        content = _text(text).encode("utf-8", "surrogateescape")
        return np.frombuffer(content, dtype=np.uint8).astype(np.int32) + N_SPECIAL

    def decode_bytes(self, ids) -> bytes:
        ids = _checked_ids(ids, self.vocab_size)
        return (ids[ids >= N_SPECIAL] - N_SPECIAL).astype(np.uint8).tobytes()


class CharTokenizer(Tokenizer):
    """Every character of the training text is a token. Lossy: any other character, and any byte that is no UTF-8,
    becomes <unk>, which decodes to U+FFFD so that the loss is seen."""

    def __init__(self, characters: str, settings: Mapping | None = None):
        super().__init__(settings)
        self.characters = characters
        code_points = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)
        self._code_of_id = np.concatenate([np.full(N_SPECIAL, 0xFFFD, np.uint32), code_points])
        self._id_of_code = np.full(0x110000, UNK_ID, dtype=np.int32)  # a slot for every code point there can be: 4 MB
        self._id_of_code[code_points] = np.arange(N_SPECIAL, self.vocab_size)

    @classmethod
    def train(cls, texts: Iterable[str]) -> Self:
        found: set[str] = set()
        for text in texts:
            found.update(text)
        if not found:
            raise ValueError("the tokenizer's training text is empty: point data at files that hold text")
        return cls("".join(sorted(c for c in found if not "\ud800" <= c <= "\udfff")))

    @property
    def vocab_size(self) -> int:
        return N_SPECIAL + len(self.characters)

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._id_of_code[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)]

    def decode_bytes(self, ids) -> bytes:
        ids = _checked_ids(ids, self.vocab_size)
        codes = self._code_of_id[ids[(ids >= N_SPECIAL) | (ids == UNK_ID)]]
        return codes.tobytes().decode("utf-32-le").encode()

    def data(self) -> dict[str, object]:
        return {"characters": self.characters}


CHUNK_CHARACTERS = 4096  # sentencepiece takes four times as long over one big string
_SPACE = "\u2581"  # sentencepiece's sign for a space: the one character its pieces cannot spell
_PROBE = "  A\n\n b\t 12\u00c9e\u0301\u212b\ufb01 " + _SPACE  # changed by every normalizer but identity
# U+2585 is its sign for the unknown; training would skip a chunk that has one. Lone surrogates have no bytes.
_UNLEARNABLE = re.compile(f"[{_SPACE}\u2585\ud800-\udfff]")
_NEEDS_BYTES = re.compile(f"([{_SPACE}\udc80-\udcff]+)")


class SentencePieceTokenizer(Tokenizer):
    """A BPE or unigram vocabulary learnt from text; what it lacks is spelt in byte tokens, so nothing is unknown.

    Long text is encoded in chunks cut at line ends, so the ids near a cut may differ from those of the whole in one
    piece. They decode to the same text.
    """

    def __init__(self, model: bytes, settings: Mapping | None = None):
        super().__init__(settings)
        self.model = model
        try:
            self._processor = sp = sentencepiece.SentencePieceProcessor()
            sp.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise ValueError("not a sentencepiece model, or a damaged one") from error
        n = sp.vocab_size()
        names = [sp.id_to_piece(i) for i in range(n)]
        special = {i for i in range(n) if sp.is_control(i) or sp.is_unknown(i)}
        own = takewhile(lambda i: i in special and names[i] == SPECIAL_TOKENS[i], range(N_SPECIAL))
        self.special_tokens = tuple(names[i] for i in own)  # all of them, if gptlab trained it
        if len(self.special_tokens) < 4:
            raise ValueError(f"ids 0 to 3 of this model are {names[:4]}, and must be {list(SPECIAL_TOKENS[:4])}")
        self._id_of_byte = {int(names[i][1:-1], 16): i for i in range(n) if sp.is_byte(i)}
        self._spelling_ids = frozenset([UNK_ID, *self._id_of_byte.values()])
        self._bytes_of_id = [b"" if i in special else names[i].replace(_SPACE, " ").encode() for i in range(n)]
        for byte, i in self._id_of_byte.items():
            self._bytes_of_id[i] = bytes([byte])
        if len(self._id_of_byte) < 256 or self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError("this model changes text: it lacks byte_fallback, or its normalization is not identity")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        model_type: str,
        character_coverage: float,
        max_train_bytes: int,
        seed: int = 0,
    ) -> Self:
        """Learn `vocab_size` tokens, specials included, from a sample of at most `max_train_bytes` of `texts`.

        `model_type` is "bpe" or "unigram". The rarest characters, beyond the share `character_coverage`, are left to
        byte tokens. The same texts and settings give the same tokenizer, on any number of cores.
        """
        if model_type not in ("bpe", "unigram"):
            raise ValueError(f"tokenizer.model_type={model_type!r} must be 'bpe' or 'unigram'")
        if not 0.98 <= character_coverage <= 1:
            raise ValueError(f"tokenizer.character_coverage={character_coverage} must lie in [0.98, 1]")
        options = {"vocab_size": vocab_size, "model_type": model_type, "character_coverage": character_coverage}
        chunks = (chunk for text in texts for chunk in _chunks(_UNLEARNABLE.sub(" ", text)))
        model = _train_model(_sample(chunks, max_train_bytes, seed), options)
        tokenizer = cls(model, options | {"max_train_bytes": max_train_bytes, "seed": seed})
        assert tokenizer.special_tokens == SPECIAL_TOKENS, tokenizer.special_tokens
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str | bytes) -> np.ndarray:
        text = _text(text)
        if not _NEEDS_BYTES.search(text):
            return np.fromiter(chain.from_iterable(map(self._processor.encode, _chunks(text))), dtype=np.int32)
        ids: list[int] = []
        for chunk in _chunks(text):
            for i, part in enumerate(_NEEDS_BYTES.split(chunk)):
                if i % 2:  # split() with a group puts what it matched at the odd places
                    ids += [self._id_of_byte[byte] for byte in part.encode("utf-8", "surrogateescape")]
                else:
                    ids += self._processor.encode(part)
        return np.array(ids, dtype=np.int32)

    def decode_bytes(self, ids) -> bytes:
        return b"".join([self._bytes_of_id[i] for i in _checked_ids(ids, self.vocab_size).tolist()])

    def data(self) -> dict[str, object]:
        return {"model": self.model}

    def _meaning(self) -> object:
        # not the model's bytes, which record how it was trained, down to the number of threads; the ids of the probe
        # show the normalizer at work
        sp = self._processor
        pieces = [(sp.id_to_piece(i), sp.get_score(i), as_bytes) for i, as_bytes in enumerate(self._bytes_of_id)]
        return [pieces, self.encode(_PROBE).tolist()]


def _chunks(text: str) -> Iterator[str]:
    """`text` in pieces of at most CHUNK_CHARACTERS, cut after a line end, else before a space, else anywhere."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        limit = start + CHUNK_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or max(text.rfind(" ", start + 1, limit), 0) or limit
        yield text[start:end]
        start = end
    yield text[start:]


def _sample(chunks: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A uniform sample of at most `max_bytes`, in order, in one pass: each chunk draws a lot, the lowest stay."""
    draw = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap whose top is the highest lot
    kept_bytes = 0
    for index, chunk in enumerate(chunks):
        heapq.heappush(kept, (-draw.random(), index, chunk))
        kept_bytes += len(chunk.encode())
        while kept_bytes > max_bytes and len(kept) > 1:  # never down to nothing
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    return [chunk for _, _, chunk in sorted(kept, key=lambda item: item[1])]


_VOCAB_REMEDIES = {  # by sentencepiece's message
    r"size too high.*<= (\d+)": "the largest possible for this text is {}; lower it, or give more text",
    r"size is smaller.* vs (\d+)": "the smallest possible for this text is {}; raise it, or lower character_coverage",
}


def _train_model(chunks: list[str], options: dict) -> bytes:
    if not any(chunk.strip() for chunk in chunks):
        raise ValueError("the tokenizer's training text is empty: point data at files that hold text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),  # files would be cut into lines, and their line ends lost
            model_writer=model,
            **options,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars="\n\t",  # a chunk's last line end is dropped in training
            pad_id=PAD_ID,  # <unk>, <s> and </s> are 0, 1 and 2 unless told otherwise
            control_symbols=list(SPECIAL_TOKENS[4:]),
            max_sentence_length=4 * CHUNK_CHARACTERS,  # in bytes; a longer one would be skipped
            num_threads=4,  # fixed: it changes the last digits of a unigram model's scores
            minloglevel=2,
        )
    except RuntimeError as error:
        for message, remedy in _VOCAB_REMEDIES.items():
            if found := re.search(message, str(error)):
                raise ValueError(f"tokenizer.vocab_size={options['vocab_size']}: {remedy.format(found[1])}") from error
        raise
    return model.getvalue()

"""Text to token ids and back: the one interface, three of its kinds, and the special tokens, declared here alone.

A special token's id never comes out of text, whatever a user types: "<|user|>" in a document is eight characters.
Only code that calls `special_id` can put one into a sequence. Sentencepiece and byte tokenizers are lossless: any
text and any bytes come back exactly. `words` and `borrowed` hold further kinds.
"""

import hashlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Self

import numpy as np
import sentencepiece

from gptlab.chunks import training_sample
from gptlab.names import load_class
from gptlab.pieces import SPACE, encoder, learn
from gptlab.vocabulary import checked_domain_tokens, listing

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
LISTING = "vocab.tsv"
FOREIGN = {  # the classes that read files of other libraries with `from_file`, by the end of a file's name
    ".json": "gptlab.borrowed.HuggingFaceTokenizer",
    ".tiktoken": "gptlab.borrowed.TiktokenTokenizer",
    ".bpe": "gptlab.borrowed.TiktokenTokenizer",
}


class Tokenizer(ABC):
    """What the rest of gptlab asks of a tokenizer. A new kind needs the abstract methods and a dotted name."""

    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    domain_tokens: tuple[str, ...] = ()  # texts that are one token wherever they stand
    loses = ""  # what of a text does not come back, in a sentence; nothing, where this is empty
    spelling_ids = frozenset([UNK_ID])  # ids that stand in for characters outside the vocabulary

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
        native = (n for character, n in counts.items() if self.spelling_ids.isdisjoint(self.encode(character).tolist()))
        return sum(native) / max(sum(counts.values()), 1)

    def kind(self, i: int) -> str:
        """What the id `i` is: "special" (it gives no text), "domain", "byte" (a part of a character) or "piece"."""
        if i < len(self.special_tokens) or not (content := self.decode_bytes([i])):
            return "special"
        if content.decode("utf-8", "replace") in self.domain_tokens:
            return "domain"
        return "byte" if i in self.spelling_ids else "piece"

    def score(self, i: int) -> float | None:
        """The figure by which pieces are chosen, where there is one."""
        return None

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
        import torch  # here, for it takes a second or two, and processes that only encode have no use for it

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
            data = {k: bytes(v.tolist()) if hasattr(v, "tolist") else v for k, v in state["data"].items()}
            tokenizer = load_class(state["class"], cls, trust)(**data, settings=state["settings"])
            recorded = state["fingerprint"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"damaged tokenizer: {error!r}") from error
        if tokenizer.fingerprint != recorded:
            raise ValueError(f"damaged tokenizer: its fingerprint is {tokenizer.fingerprint}, recorded was {recorded}")
        return tokenizer

    def save(self, folder: Path) -> None:
        """Write `state` to `folder`: a JSON file, last, and beside it `tokenizer.<key>` for each bytes of `data`.

        `vocab.tsv` is for people. Another tokenizer that stands there is kept, in `<folder>.old-<its fingerprint>`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _move_aside(folder, self.fingerprint)
        data = dict(self.data())
        files = sorted(key for key, value in data.items() if type(value) is bytes)
        for key in files:
            _write(folder / f"tokenizer.{key}", data.pop(key))
        names = dict(enumerate(self.special_tokens))
        ids = range(self.vocab_size)
        rows = ((i, names.get(i), self.decode_bytes([i]), self.kind(i), self.score(i)) for i in ids)
        _write(folder / LISTING, listing(rows).encode())
        state = self.state() | {"data": data, "files": files}
        _write(folder / SIDECAR, json.dumps(state, indent=1, sort_keys=True).encode())


tokenizer_from_state = Tokenizer.from_state


def load_tokenizer(path: str | Path, trust: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer saved at `path`: its folder, the JSON file in it, a run folder, or a file of another library.

    Those are HuggingFace's tokenizer.json, or a folder with it; a .tiktoken file or GPT-2's vocab.bpe; and a bare
    sentencepiece model, lossless and with `<unk> <s> </s> <pad>` as ids 0 to 3. Raises ValueError for anything else.
    """
    path = Path(path)
    places = [path / SIDECAR, path / "tokenizer" / SIDECAR, path / "tokenizer.json"] if path.is_dir() else [path]
    if (file := next((place for place in places if place.is_file()), None)) is None:
        raise ValueError(f"no tokenizer at {path}: give tokenizer.path a run, or a tokenizer folder or file")
    try:
        state = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else None
        if file.suffix in FOREIGN and not (isinstance(state, dict) and "model" not in state):
            return load_class(FOREIGN[file.suffix], Tokenizer).from_file(file)
        if state is None:
            return SentencePieceTokenizer(file.read_bytes())
        if not isinstance(state.get("data"), dict):
            raise ValueError("it does not hold a tokenizer")
        for key in state.get("files", ()):
            if not key.isidentifier():  # the key becomes a file name: it must stay in this folder
                raise ValueError(f"damaged tokenizer: {key!r} names no file of its own")
            state["data"][key] = file.with_name(f"tokenizer.{key}").read_bytes()
        return Tokenizer.from_state(state, trust)
    except (ValueError, OSError, RecursionError) as error:
        remedy = "; it is damaged: restore it, or name another" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{file}: {error}{remedy}") from error


def _move_aside(folder: Path, fingerprint: str) -> None:
    """Move a tokenizer with another fingerprint from `folder` to one beside it, unless it cannot be read anyway."""
    try:
        state = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        theirs, files = str(state["fingerprint"]), [f"tokenizer.{key}" for key in state["files"] if key.isidentifier()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if theirs == fingerprint:
        return
    aside = folder.with_name(f"{folder.absolute().name}.old-{theirs[:8]}")
    aside.mkdir(exist_ok=True)
    for name in (*files, LISTING):
        if (folder / name).is_file():
            shutil.copy2(folder / name, aside / name)
    os.replace(folder / SIDECAR, aside / SIDECAR)  # last: from now on it is there, and no longer here


def _dotted_name(tokenizer: Tokenizer) -> str:
    return f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"


def _write(path: Path, content: bytes) -> None:
    """Write all of `content` or nothing: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def checked_ids(ids, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not all lie in the vocabulary of {vocab_size}")
    return ids


def as_text(text: str | bytes) -> str:
    """`text` as a str in which bytes that are no UTF-8 are U+DC80 to U+DCFF, Python's "surrogateescape"."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "surrogateescape")
    if text.isascii():
        return text
    # any other lone surrogate, such as the JSON "\\ud800", stands for no bytes at all
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)


class ByteTokenizer(Tokenizer):
    """Every byte is a token. Nothing to train, nothing unknown, and the longest sequences; coverage is 1."""

    vocab_size = N_SPECIAL + 256

    def kind(self, i: int) -> str:
        return "special" if i < N_SPECIAL else "byte"

    @classmethod
    def train(cls, texts: Iterable[str] = ()) -> Self:
        return cls()

    def encode(self, text: str | bytes) -> np.ndarray:
        content = as_text(text).encode("utf-8", "surrogateescape")
        return np.frombuffer(content, dtype=np.uint8).astype(np.int32) + N_SPECIAL

    def decode_bytes(self, ids) -> bytes:
        ids = checked_ids(ids, self.vocab_size)
        return (ids[ids >= N_SPECIAL] - N_SPECIAL).astype(np.uint8).tobytes()


class CharTokenizer(Tokenizer):
    """Every character of the training text is a token. Lossy: any other character, and any byte that is no UTF-8,
    becomes <unk>, which decodes to U+FFFD so that the loss is seen."""

    loses = "characters that the text it learnt from did not hold: they become <unk>, which is read as U+FFFD"

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
        ids = checked_ids(ids, self.vocab_size)
        codes = self._code_of_id[ids[(ids >= N_SPECIAL) | (ids == UNK_ID)]]
        return codes.tobytes().decode("utf-32-le").encode()

    def data(self) -> dict[str, object]:
        return {"characters": self.characters}


_PROBE = "  A\n\n b\t 12\u00c9e\u0301\u212b\ufb01 " + SPACE  # changed by every normalizer but identity
# U+2585 is its sign for the unknown; training would skip a chunk that has one. Lone surrogates have no bytes.
_UNLEARNABLE = re.compile(f"[{SPACE}\u2585\ud800-\udfff]")
_NEEDS_BYTES = re.compile(f"([{SPACE}\udc80-\udcff]+)")


class SentencePieceTokenizer(Tokenizer):
    """A BPE or unigram vocabulary learnt from text; what it lacks is spelt in byte tokens, so nothing is unknown.

    Unigram models, and those made elsewhere, encode long text in chunks cut at line ends: ids near a cut may differ
    from those of the whole, and decode to the same text.
    """

    def __init__(self, model: bytes, settings: Mapping | None = None):
        super().__init__(settings)
        self.model = model
        self.domain_tokens = tuple(self.settings.get("domain_tokens", ()))  # the model can't be asked which they are
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
        self._ids = encoder(sp, is_bpe=self.settings.get("model_type") == "bpe")
        self._id_of_byte = {int(names[i][1:-1], 16): i for i in range(n) if sp.is_byte(i)}
        self.spelling_ids = frozenset([UNK_ID, *self._id_of_byte.values()])
        self._bytes_of_id = [b"" if i in special else names[i].replace(SPACE, " ").encode() for i in range(n)]
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
        domain_tokens: list[str] | None = None,
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
        domain = checked_domain_tokens(domain_tokens, cls.special_tokens)
        kept = training_sample((_UNLEARNABLE.sub(" ", text) for text in texts), max_train_bytes, seed)
        model = learn(kept, SPECIAL_TOKENS, domain, **options)
        used = {"max_train_bytes": max_train_bytes, "seed": seed, "domain_tokens": domain}
        tokenizer = cls(model, options | used)
        assert tokenizer.special_tokens == SPECIAL_TOKENS, tokenizer.special_tokens
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str | bytes) -> np.ndarray:
        text = as_text(text)
        if text.isascii() or not _NEEDS_BYTES.search(text):
            return np.fromiter(self._ids(text), dtype=np.int32)
        ids: list[int] = []
        for i, part in enumerate(_NEEDS_BYTES.split(text)):
            if i % 2:  # split() with a group puts what it matched at the odd places
                ids += [self._id_of_byte[byte] for byte in part.encode("utf-8", "surrogateescape")]
            else:
                ids += self._ids(part)
        return np.array(ids, dtype=np.int32)

    def decode_bytes(self, ids) -> bytes:
        return b"".join([self._bytes_of_id[i] for i in checked_ids(ids, self.vocab_size).tolist()])

    def score(self, i: int) -> float | None:
        return self._processor.get_score(i)

    def data(self) -> dict[str, object]:
        return {"model": self.model}

    def _meaning(self) -> object:
        # not the model's bytes, which record how it was trained, down to the number of threads; the ids of the probe
        # show the normalizer at work
        sp = self._processor
        pieces = [(sp.id_to_piece(i), sp.get_score(i), as_bytes) for i, as_bytes in enumerate(self._bytes_of_id)]
        return [pieces, self.encode(_PROBE).tolist()]

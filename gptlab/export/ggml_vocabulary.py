"""gptlab's tokenizers as llama.cpp has them: sentencepiece BPE by scores, and byte-level BPE by merges.

It has no unigram model that spells in bytes, and none of characters or words.
"""

from dataclasses import dataclass
from typing import Any

from gptlab.borrowed import HuggingFaceTokenizer, TiktokenTokenizer
from gptlab.export.vocabulary import CHARACTER_OF, special_names, tokenizer_json
from gptlab.pieces import KINDS, SPACE, contents
from gptlab.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

NORMAL, CONTROL, DOMAIN, UNUSED = (KINDS.index(kind) for kind in ("normal", "control", "domain", "unused"))  # the same
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PATTERNS = {LLAMA_3: "llama-bpe", LLAMA_3.replace("{1,3}", ""): "qwen2"}  # how text is cut, and the name of that
OF_TIKTOKEN = {"gpt2": "gpt-2", "r50k_base": "gpt-2", "p50k_base": "gpt-2", "cl100k_base": "llama-bpe"}
# llama.cpp wants at least one merge; these two bytes are in no text
NO_MERGE = f"{CHARACTER_OF[254]} {CHARACTER_OF[255]}"


@dataclass
class Vocabulary:
    model: str
    tokens: list[str]
    types: list[int]


@dataclass
class Scores(Vocabulary):
    scores: list[float]


@dataclass
class BytePairs(Vocabulary):
    pre: str  # llama.cpp's name for how text is cut first
    merges: list[str]


def vocabulary_of(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a network that knows `size` ids. Raises ValueError for a tokenizer that llama.cpp lacks."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return scores(tokenizer, size)
    if isinstance(tokenizer, ByteTokenizer | HuggingFaceTokenizer | TiktokenTokenizer):
        return byte_pairs(tokenizer, size)
    raise ValueError(f"llama.cpp has no tokenizer like {type(tokenizer).__name__}; use --format=hf")


def scores(tokenizer: SentencePieceTokenizer, size: int) -> Scores:
    model_type, pieces = contents(tokenizer.model)
    if model_type != "bpe":
        raise ValueError(
            f"llama.cpp's {model_type} tokenizer does not spell in bytes, as sentencepiece's does; use --format=hf, "
            "or tokenizer.model_type=bpe"
        )
    tokens = [piece.text.replace(SPACE, " ") if piece.kind == "domain" else piece.text for piece in pieces]
    types = [KINDS.index(piece.kind) for piece in pieces]
    spare = range(len(pieces), size)
    return Scores(
        "llama",
        tokens + [unused(i) for i in spare],
        types + [UNUSED for _ in spare],
        [piece.score for piece in pieces] + [0.0 for _ in spare],
    )


def byte_pairs(tokenizer: Tokenizer, size: int) -> BytePairs:
    content = tokenizer_json(tokenizer)
    names = [unused(i) for i in range(size)]
    types = [UNUSED] * size
    for name, i in content["model"]["vocab"].items():
        names[i], types[i] = name, NORMAL
    for token in content["added_tokens"]:
        names[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else DOMAIN
    assert names[: len(tokenizer.special_tokens)] == special_names(tokenizer)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    return BytePairs("gpt2", names, types, cut_of(tokenizer, content), merges or [NO_MERGE])


def cut_of(tokenizer: Tokenizer, content: dict[str, Any]) -> str:
    """llama.cpp's name for how a text is cut before pieces are looked for."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return OF_TIKTOKEN[tokenizer.name]
    if isinstance(tokenizer, ByteTokenizer):
        return "gpt-2"  # however it is cut: nothing is merged
    if content["normalizer"] is not None:
        raise ValueError(f"llama.cpp has no normalizer {content['normalizer'].get('type')}; use --format=hf")
    cut = content["pre_tokenizer"]
    parts = cut.get("pretokenizers", [cut])
    if [part["type"] for part in parts] == ["ByteLevel"] and parts[0].get("use_regex", True):
        if not parts[0].get("add_prefix_space"):
            return "gpt-2"
    elif [part["type"] for part in parts] == ["Split", "ByteLevel"]:
        pattern = parts[0]["pattern"].get("Regex")
        if pattern in PATTERNS and not parts[1].get("use_regex", True):
            return PATTERNS[pattern]
    raise ValueError("llama.cpp does not know how this tokenizer cuts text before it looks for pieces; use --format=hf")


def unused(i: int) -> str:
    return f"[PAD{i}]"

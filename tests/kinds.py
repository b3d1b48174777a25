"""One small tokenizer of each kind, and text that is awkward for some of them."""

import argparse
import base64
import functools
import inspect
import logging

import tokenizers as tokenizers_library
from hypothesis import strategies as st

from gptlab.borrowed import HuggingFaceTokenizer, TiktokenTokenizer
from gptlab.tokenizer import SPECIAL_TOKENS, ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from gptlab.words import WordTokenizer

LOSSLESS = ["bpe", "unigram", "byte", "hf", "tiktoken", "foreign", "domain", "hf-domain"]
LOSSY = ["char", "word"]
KINDS = LOSSLESS + LOSSY
TRAINED = [kind for kind in KINDS if kind not in ("byte", "tiktoken", "foreign")]
DOCUMENTS = [inspect.getsource(argparse), inspect.getsource(logging)]
SPANISH = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme: ¿quién? ¡Él, señor! "
SETTINGS = {"vocab_size": 500, "character_coverage": 1.0, "max_train_bytes": 10**6}


DOMAIN = ["ACME", "->", "def parse", "\n\n#", "ñandú"]


def train(kind: str, texts=DOCUMENTS, **changes) -> Tokenizer:
    texts = iter(texts)
    settings = SETTINGS | ({"domain_tokens": DOMAIN} if kind.endswith("domain") else {}) | changes
    if kind.startswith("hf"):
        return HuggingFaceTokenizer.train(texts, **{k: v for k, v in settings.items() if k != "character_coverage"})
    if kind == "word":
        texts = (f"{text} a b abc ñandú" for text in texts)
        return WordTokenizer.train(texts, **{"vocab_size": 10_000, "max_train_bytes": 10**6} | changes)
    if kind == "char":
        return CharTokenizer.train(texts)
    if kind == "byte":
        return ByteTokenizer.train(texts)
    if kind == "foreign":
        return HuggingFaceTokenizer(foreign_json().encode())
    if kind == "tiktoken":
        return TiktokenTokenizer(ranks_of(train("hf")), "gpt2")
    return SentencePieceTokenizer.train(texts, **(settings | {"model_type": "bpe" if kind == "domain" else kind}))


def foreign_json() -> str:
    """A tokenizer.json as GPT-2's is: none of gptlab's special tokens, and one of its own, which is its last."""
    tokenizer = tokenizers_library.Tokenizer(tokenizers_library.models.BPE())
    tokenizer.pre_tokenizer = tokenizers_library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers_library.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers_library.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


def ranks_of(tokenizer: HuggingFaceTokenizer) -> bytes:
    """A file of ranks with the pieces of another tokenizer, in their order."""
    pieces = [tokenizer.decode_bytes([i]) for i in range(13, tokenizer.vocab_size)]
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


@functools.cache
def of_kind(kind: str) -> Tokenizer:
    """The one that all tests share."""
    return train(kind)


# What sentencepiece is known to mangle, or a user could use to forge a special token.
AWKWARD = [
    *SPECIAL_TOKENS,
    *("<0x41>", "\u2581", "\u2585", "\u2047", "\x00", "\r\n", "\n\n\n", "\t", "    ", " ", "\ufeff", "\ufffd"),
    *DOMAIN,
    *("\u00c5", "A\u030a", "\u212b", "\ufb01", "\u3000", "\U0001f600", "def f():\n    return 1\n", "3.14159"),
]
any_text = st.lists(st.text() | st.sampled_from(AWKWARD), max_size=8).map("".join)

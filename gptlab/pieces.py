"""Learning a sentencepiece model that loses nothing: chunks of text in, the bytes of a model out."""

import io
import re
from collections.abc import Sequence

import sentencepiece

from gptlab.chunks import CHUNK_CHARACTERS

SPACE = "\u2581"  # sentencepiece's sign for a space: the one character its pieces cannot spell
RESERVED = re.compile(f"[{SPACE}\u2585]|<0x[0-9A-F]{{2}}>")  # with that for the unknown, and its names of bytes
REMEDIES = {  # by sentencepiece's message
    r"size too high.*<= (\d+)": "the largest possible for this text is {}; lower it, or give more text",
    r"size is smaller.* vs (\d+)": "the smallest possible for this text is {}; raise it, or lower character_coverage",
}


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

"""A vocabulary of whole words, with `<unk>` for every other: the oldest way, kept to compare with."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

import numpy as np

from gptlab.chunks import training_sample
from gptlab.tokenizer import N_SPECIAL, UNK_ID, Tokenizer, checked_ids
from gptlab.vocabulary import checked_domain_tokens

PIECES = re.compile(r"\w+|\s+|[^\w\s]")  # a word, a run of spaces, or one mark: joined again they are the text
ALWAYS = (" ", "\n", "\t")  # in every vocabulary, since an unknown run of spaces is spelt one by one


class WordTokenizer(Tokenizer):
    """Every frequent word, run of spaces and mark is a token, upper and lower case apart. Lossy: any other word or
    mark, and any byte that is no UTF-8, becomes <unk>, which decodes to U+FFFD so that the loss is seen."""

    loses = "words and marks outside the vocabulary: they become <unk>, which is read as U+FFFD"

    def __init__(self, words: list[str], domain_tokens: Sequence[str] = (), settings: Mapping | None = None):
        super().__init__(settings)
        self.words, self.domain_tokens = words, tuple(domain_tokens)
        self._texts = [b""] * N_SPECIAL + [text.encode() for text in (*domain_tokens, *words)]
        self._texts[UNK_ID] = "\ufffd".encode()
        self._ids = {text: i for i, text in enumerate((*domain_tokens, *words), N_SPECIAL)}
        longest_first = sorted(domain_tokens, key=len, reverse=True)
        self._domain = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if domain_tokens else None

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
        """Take the most frequent words of a sample of at most `max_train_bytes` of `texts`.

        There are `vocab_size` tokens, special and domain tokens included, or fewer where the text has no more words.
        """
        domain = checked_domain_tokens(domain_tokens, cls.special_tokens)
        room = vocab_size - N_SPECIAL - len(domain)
        if room <= len(ALWAYS):
            least = N_SPECIAL + len(domain) + len(ALWAYS) + 1
            raise ValueError(f"tokenizer.vocab_size={vocab_size}: the smallest for any text is {least}; raise it")
        splitter = cls([], domain)
        found = Counter(ALWAYS)
        for chunk in training_sample(texts, max_train_bytes, seed):
            found.update(piece for piece in splitter.split(chunk) if piece not in splitter.domain_tokens)
        for character in [word for word in found if "\ud800" <= word <= "\udfff"]:
            del found[character]
        words = sorted(found, key=lambda word: (word not in ALWAYS, -found[word], word))[:room]
        used = {"vocab_size": vocab_size, "max_train_bytes": max_train_bytes, "seed": seed, "domain_tokens": domain}
        return cls(words, domain, used)

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    def split(self, text: str) -> Iterator[str]:
        """Its words, runs of spaces, marks and domain tokens."""
        for i, part in enumerate(self._domain.split(text) if self._domain else [text]):
            yield from [part] if i % 2 else PIECES.findall(part)  # a split by a group has what it matched at odd places

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        ids: list[int] = []
        for piece in self.split(text):
            known = self._ids.get(piece)
            if known is None and piece.isspace():
                ids += [self._ids.get(character, UNK_ID) for character in piece]
            else:
                ids.append(UNK_ID if known is None else known)
        return np.array(ids, dtype=np.int32)

    def decode_bytes(self, ids) -> bytes:
        return b"".join([self._texts[i] for i in checked_ids(ids, self.vocab_size).tolist()])

    def coverage(self, counts: Mapping[str, int]) -> float:
        """The share of characters, weighted by their `counts`, that occur in the words it knows."""
        known = set().union(*self._ids)
        return sum(n for character, n in counts.items() if character in known) / max(sum(counts.values()), 1)

    def kind(self, i: int) -> str:
        return "special" if i < N_SPECIAL else "domain" if i < N_SPECIAL + len(self.domain_tokens) else "piece"

    def data(self) -> dict[str, object]:
        return {"words": self.words, "domain_tokens": list(self.domain_tokens)}

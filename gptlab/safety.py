"""A filter on what goes in and what comes out. It knows words and repetition, not meaning: it is no alignment.

In every mode, text that a user gives is encoded as text, so that no control token comes of it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptlab.tokenizer import Tokenizer

MODES = ("off", "standard", "strict")
MAX_TOKENS, MAX_PROMPT_CHARACTERS = 1024, 32_768  # of strict mode
LOOP_TOKENS, LOOP_REPEATS, LOOP_PERIOD = 48, 4, 64  # a loop: so many tokens at least, so often, of so many at most


@dataclass(frozen=True)
class Safety:
    """`off` lets everything pass; `standard` draws no control token; `strict` also caps lengths, and ends at a loop or
    a blocked phrase, before any of it is shown."""

    mode: str = "off"
    blocked: re.Pattern | None = None
    longest: int = 0  # characters of a blocked phrase

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"safety_mode={self.mode!r} is none of {', '.join(MODES)}")
        if self.blocked is not None and self.mode != "strict":
            raise ValueError(f"a blocklist goes with safety_mode=strict, not {self.mode}")

    @classmethod
    def of(cls, mode: str, blocklist: str | Path | None = None) -> "Safety":
        """Raises ValueError for a blocklist that cannot be read, or holds nothing."""
        if blocklist is None:
            return cls(mode)
        try:
            lines = Path(blocklist).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"--blocklist {blocklist}: {error}; give a text file with a phrase a line") from error
        phrases = [line.strip() for line in lines if line.strip()]
        if not phrases:
            raise ValueError(f"--blocklist {blocklist}: holds no phrase; write one a line")
        spaced = (r"\s{1,3}".join(re.escape(word) for word in phrase.split()) for phrase in phrases)
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)", re.IGNORECASE)
        return cls(mode, pattern, max(len(phrase) + 2 * phrase.count(" ") for phrase in phrases))

    def require_prompt(self, text: str) -> None:
        """Raises ValueError for a prompt that strict mode does not take."""
        if self.mode == "strict" and len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"safety_mode=strict takes prompts of {MAX_PROMPT_CHARACTERS} characters, not {len(text)}")

    def blocks(self, text: str) -> bool:
        return self.blocked is not None and self.blocked.search(text) is not None

    def max_tokens(self, wanted: int) -> int:
        return min(wanted, MAX_TOKENS) if self.mode == "strict" else wanted

    def allowed(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> Tensor | None:
        """True for each id that may be drawn: text, and what ends it. None: all."""
        if self.mode == "off":
            return None
        allowed = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
        allowed[: len(tokenizer.special_tokens)] = False
        allowed[list(stop_ids)] = True
        return allowed

    def loops(self, ids: list[int]) -> bool:
        """Whether the end of `ids` is the same few tokens again and again."""
        if self.mode != "strict":
            return False
        for period in range(1, LOOP_PERIOD + 1):
            length = max(LOOP_TOKENS, LOOP_REPEATS * period)
            if len(ids) >= length and ids[-length:-period] == ids[-length + period :]:
                return True
        return False

"""What a network writes: continuations of prompts, as ids and as text."""

import codecs
from dataclasses import dataclass

import torch

from gptlab.engine import generate
from gptlab.model import GPT
from gptlab.tokenizer import EOS_ID, Tokenizer


@dataclass(frozen=True)
class Writer:
    """Continues prompts with a network, each from the start of a document, until it ends or is `max_tokens` long."""

    model: GPT
    tokenizer: Tokenizer
    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None

    def __call__(self, prompt: list[int], seed: int = 0) -> tuple[str, bool]:
        """The text that follows `prompt`, and whether it ends by itself."""
        ids = generate(
            self.model,
            torch.tensor([EOS_ID, *prompt]),
            self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=seed,
            stop_id=EOS_ID,
            vocab_size=self.tokenizer.vocab_size,
        )
        return text_of(self.tokenizer.decode_bytes(ids)), len(ids) < self.max_tokens


def text_of(content: bytes) -> str:
    """Bytes as text, without the half of a character at which they may have been cut off."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(content)


def until(text: str, stops: list[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]

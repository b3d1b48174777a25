"""Answers in OpenAI's shapes: whole, or as the events of a stream."""

import codecs
import math
import secrets
import time
from typing import Any

from gptlab.engine import Logprob
from gptlab.sampling import NOT_FINITE
from gptlab.serve.errors import encoded
from gptlab.serve.worker import Piece, Scored
from gptlab.tokenizer import Tokenizer

LOWEST = -9999.0  # for a log-probability of minus infinity, which JSON cannot say


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + encoded(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def finite(value: float) -> float:
    if math.isnan(value):
        raise ValueError(NOT_FINITE)
    return max(value, LOWEST)


def spelt(tokenizer: Tokenizer, token: int) -> str:
    """What a token is called: its text; the name of a special one; bytes, where it is half a character."""
    if token < len(tokenizer.special_tokens):
        return tokenizer.special_tokens[token]
    content = tokenizer.decode_bytes([token])
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Shape:
    """The answer to one request. With `scores`, log-probabilities are told."""

    whole_object = chunk_object = prefix = ""

    def __init__(self, model: str, tokenizer: Tokenizer, scores: bool, with_usage: bool):
        self.model, self.tokenizer, self.scores, self.with_usage = model, tokenizer, scores, with_usage
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, pieces: list[Piece], use: dict[str, int]) -> dict[str, Any]:
        """All of it, of the last and only piece of each text."""
        choices = [self.choice(piece) for piece in sorted(pieces, key=lambda piece: piece.index)]
        return self._envelope(self.whole_object, choices) | {"usage": use}

    def chunk(self, choices: list[dict[str, Any]]) -> bytes:
        """An event of a stream. Where the usage comes with the last one, it is null in those before."""
        return event(self._envelope(self.chunk_object, choices) | ({"usage": None} if self.with_usage else {}))

    def last(self, use: dict[str, int]) -> bytes:
        """What ends a stream."""
        if not self.with_usage:
            return DONE
        return event(self._envelope(self.chunk_object, []) | {"usage": use}) + DONE

    def choice(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def events(self, piece: Piece) -> bytes:
        raise NotImplementedError


class CompletionShape(Shape):
    whole_object = chunk_object = "text_completion"
    prefix = "cmpl"
    echoes: list[str] | None = None  # the prompts' texts, with which the `n` completions of each begin
    n = 1

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        self._begun: dict[int, int] = {}  # characters of the echo of each text that has begun

    def choice(self, piece: Piece) -> dict[str, Any]:
        text, echo_characters = piece.text, self._begun.get(piece.index, 0)
        if piece.index not in self._begun:
            echo = self.echoes[piece.index // self.n] if self.echoes else ""
            echo_characters = self._begun[piece.index] = len(echo)
            text = echo + text
        scored = [Scored(one.logprob, one.offset + echo_characters) for one in piece.scored]
        if piece.prompt_scored:
            scored = self._placed(piece.prompt_scored) + scored
        logprobs = self._logprobs(scored) if self.scores else None
        return {"index": piece.index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def events(self, piece: Piece) -> bytes:
        return self.chunk([self.choice(piece)])

    def _placed(self, prompt: list[Logprob]) -> list[Scored]:
        """A prompt's tokens, and where they begin."""
        decoder, characters, placed = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
        for one in prompt:
            placed.append(Scored(one, characters))
            characters += len(decoder.decode(self.tokenizer.decode_bytes([one.token])))
        return placed

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        top: list[dict[str, float] | None] = []
        for one in (one.logprob for one in scored):
            if one.value is None:
                top.append(None)
                continue
            row: dict[str, float] = {}
            for token, value in [*one.likeliest, (one.token, one.value)]:
                row.setdefault(spelt(self.tokenizer, token), finite(value))
            top.append(row)
        return {
            "tokens": [spelt(self.tokenizer, one.logprob.token) for one in scored],
            "token_logprobs": [None if one.logprob.value is None else finite(one.logprob.value) for one in scored],
            "top_logprobs": top,
            "text_offset": [one.offset for one in scored],
        }


class ChatShape(Shape):
    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        self._begun: set[int] = set()

    def choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(piece, "message", message, piece.finish_reason)

    def events(self, piece: Piece) -> bytes:
        events = b""
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            role = {"role": "assistant", "content": "", "refusal": None}
            events += self.chunk([{"index": piece.index, "delta": role, "logprobs": None, "finish_reason": None}])
        if piece.text or piece.scored:
            events += self.chunk([self._choice(piece, "delta", {"content": piece.text}, None)])
        if piece.finish_reason:
            last = {"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason}
            events += self.chunk([last])
        return events

    def _choice(self, piece: Piece, name: str, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        logprobs = {"content": [self._scored(one.logprob) for one in piece.scored], "refusal": None}
        return {
            "index": piece.index,
            name: said,
            "logprobs": logprobs if self.scores else None,
            "finish_reason": finish_reason,
        }

    def _scored(self, one: Logprob) -> dict[str, Any]:
        return self._token(one.token, one.value) | {
            "top_logprobs": [self._token(token, value) for token, value in one.likeliest]
        }

    def _token(self, token: int, value: float) -> dict[str, Any]:
        content = list(self.tokenizer.decode_bytes([token]))
        return {"token": spelt(self.tokenizer, token), "logprob": finite(value), "bytes": content}

"""Ids in, text out, as it comes: never half a character, and nothing that may yet turn out to be a stop string."""

import codecs
import re
from collections.abc import Sequence

from gptlab.engine import Sample
from gptlab.safety import Safety
from gptlab.tokenizer import Tokenizer


class TextStream:
    """The text of tokens that come one by one, up to and without the first of the strings `stop`."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("stop='' is nothing to stop at: leave it out")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False  # a stop string has come
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """What can be shown now that `token` is there."""
        return self._release(self._decoder.decode(self.tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """What was held back, when no more will come; half a character is U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """The characters at the end of `text` with which `stop` begins, at most all but one of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Guarded:
    """Text of a sample on its way out, of which `safety` lets pass what it may.

    A phrase can only be judged when the word after it has begun: as much as the longest phrase is held back.
    """

    def __init__(self, safety: Safety):
        self.safety, self._held = safety, ""
        self.tripped = False

    def add(self, text: str, final: bool = False) -> str:
        if self.safety.blocked is None or self.tripped:
            return "" if self.tripped else text
        self._held += text
        match = self.safety.blocked.search(self._held)
        if match and (final or match.end() < len(self._held)):
            self.tripped = True
            passed, self._held = self._held[: match.start()], ""
            return passed
        keep = 0 if final else self._start_of_doubt()
        passed, self._held = (self._held, "") if final else (self._held[:keep], self._held[keep:])
        return passed

    def _start_of_doubt(self) -> int:
        """Where the text begins that may yet be a part of a phrase: the beginning of a word, far enough back."""
        place = len(self._held) - self.safety.longest - 1
        while place > 0 and re.match(r"\w", self._held[place - 1]):
            place -= 1
        return max(place, 0)


class Output:
    """What may be shown of a sample, as it grows: its text, up to a stop string and as far as `safety` lets it pass."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), safety: Safety | None = None):
        self.text = ""
        self.finish_reason: str | None = None  # stop | length | content_filter, when no more will come
        self._safety = safety or Safety()
        self._stream, self._guard, self._taken = TextStream(tokenizer, stop), Guarded(self._safety), 0

    def take(self, sample: Sample) -> str:
        """What has come since, and can be shown. When `finish_reason` is then set, the sample is to be cancelled.

        Raises the sample's own error, if it has one.
        """
        if sample.error is not None:
            raise sample.error
        new = ""
        if self.finish_reason is None:
            for token in sample.ids[self._taken :]:
                new += self._guard.add(self._stream.add(token))
            self._taken = len(sample.ids)
            if self._safety.loops(sample.ids):
                self.finish_reason = "content_filter"
            elif self._stream.stopped or sample.finish_reason:
                new += self._guard.add(self._stream.end(), final=True)
                self.finish_reason = "stop" if self._stream.stopped else sample.finish_reason
            if self._guard.tripped:
                self.finish_reason = "content_filter"
            self.text += new
        return new

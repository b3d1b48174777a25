"""The one thread that owns the engine: requests come in by a queue, and what comes of them goes back to who asked."""

import bisect
import codecs
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from gptlab.engine import Engine, Logprob, Request, Sample
from gptlab.safety import Safety
from gptlab.texts import Output
from gptlab.tokenizer import Tokenizer

log = logging.getLogger("gptlab.serve")


@dataclass
class Scored:
    """A token's log-probabilities, and at which character of its text it begins."""

    logprob: Logprob
    offset: int


@dataclass
class Piece:
    """What has come of one text since the piece before."""

    index: int
    text: str
    tokens: int  # that were generated for it so far
    finish_reason: str | None = None
    scored: list[Scored] = field(default_factory=list)
    prompt_scored: list[Logprob] = field(default_factory=list)  # with the first piece, where they were asked for


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The server ends."""


class Job:
    """Prompts that came together, and `hear`, which is told what comes of them."""

    def __init__(
        self,
        requests: Sequence[Request],
        hear: Callable[[Piece | Exception], None],
        stop: Sequence[str] = (),
        safety: Safety | None = None,
        streams: bool = True,
    ):
        self.requests, self.hear, self.stop, self.safety, self.streams = requests, hear, stop, safety, streams
        self.texts: list[Text] = []  # those that are not finished


class Text:
    """One text of a job, as it grows; it has number `index` of the job's. `first` has read the prompt."""

    def __init__(self, job: Job, index: int, sample: Sample, first: Sample, tokenizer: Tokenizer):
        self.job, self.index, self.sample, self.first, self.tokenizer = job, index, sample, first, tokenizer
        self.output = Output(tokenizer, job.stop, job.safety)
        self._shown = self._scored = self._characters = 0
        self._offsets: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = True

    def piece(self) -> Piece | None:
        """What is new and can be shown, if anything. Raises the sample's own error."""
        self.output.take(self.sample)
        finish_reason, text = self.output.finish_reason, self.output.text[self._shown :]
        if not finish_reason and not (self.job.streams and text):
            return None
        piece = Piece(self.index, text, len(self.sample.ids), finish_reason, self._newly_scored(finish_reason))
        if self._is_first:
            piece.prompt_scored = self.first.prompt_logprobs
        self._shown, self._is_first = len(self.output.text), False
        return piece

    def _newly_scored(self, finish_reason: str | None) -> list[Scored]:
        """The tokens whose first character is out; those that a stop string or the filter cut off never are."""
        if self.sample.request.logprobs is None:
            return []
        for token in self.sample.ids[len(self._offsets) :]:
            self._offsets.append(self._characters)
            self._characters += len(self._decoder.decode(self.tokenizer.decode_bytes([token])))
        end, shown = len(self._offsets), len(self.output.text)
        if not finish_reason or self._characters + len(self._decoder.decode(b"", final=True)) > shown:
            end = bisect.bisect_left(self._offsets, shown)
        new = range(self._scored, end)
        self._scored = max(end, self._scored)
        return [Scored(self.sample.logprobs[i], self._offsets[i]) for i in new]


class Worker:
    """Runs `new_engine()` on a thread of its own, for as many jobs at a time as it has rows.

    `submit` and `cancel` may be called from any thread. What comes is heard where `call` calls what it is given: an
    event loop's thread, which is woken once a step. A sample's own error ends its job alone.
    """

    def __init__(self, new_engine: Callable[[], Engine], tokenizer: Tokenizer):
        self._new_engine, self.tokenizer, self.engine = new_engine, tokenizer, new_engine()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._texts: dict[Sample, Text] = {}
        self._said: list[tuple[Job, Piece | Exception]] = []  # and not told yet
        self._threads = torch.get_num_threads()  # of this thread, and not of another one by itself
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock, self._has_ended = threading.Lock(), False

    def start(self, call: Callable[[Callable[[], None]], object]) -> None:
        self._call = call
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """Samples that are being generated, or whose prompt is being read."""
        return len(self.engine.active) + len(self.engine.reading)

    def submit(self, job: Job) -> None:
        with self._lock:
            if not self._has_ended:
                self._inbox.put(lambda: self._add(job))
                return
        self._call(lambda: job.hear(Stopped("the engine has ended")))

    def cancel(self, job: Job) -> None:
        """Nothing more will come of it."""
        self._inbox.put(lambda: self._drop(job))

    def stop(self) -> None:
        """End every job with `Stopped`, and the thread."""
        self._inbox.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._heed():
                try:
                    self._step()
                except Exception as error:
                    log.exception("the engine failed, and begins anew")
                    self._fail(self._texts.values(), error)
                    self.engine = self._new_engine()
                self._tell()
        finally:
            with self._lock:
                self._has_ended = True
            while not self._inbox.empty():
                if act := self._inbox.get():
                    act()
            self._fail(self._texts.values(), Stopped("the server ends"))
            self._tell()

    def _heed(self) -> bool:
        """Do what was asked for meanwhile, and wait for it where there is nothing else to do; whether to go on."""
        while True:
            try:
                act = self._inbox.get(block=self.engine.is_idle)
            except queue.Empty:
                return True
            if act is None:
                return False
            act()
            if self.engine.is_idle:
                self._tell()

    def _tell(self) -> None:
        if said := self._said:
            self._said = []

            def hear() -> None:
                for job, item in said:
                    job.hear(item)

            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._call(hear)

    def _add(self, job: Job) -> None:
        try:
            for request in job.requests:
                samples = self.engine.add(request)
                for sample in samples:
                    text = Text(job, len(job.texts), sample, samples[0], self.tokenizer)
                    self._texts[sample] = text
                    job.texts.append(text)
        except Exception as error:
            self._drop(job)
            self._said.append((job, error))

    def _drop(self, job: Job) -> None:
        for text in list(job.texts):
            self._leave(text)

    def _leave(self, text: Text) -> None:
        text.job.texts.remove(text)
        self.engine.cancel(text.sample)
        self._texts.pop(text.sample, None)

    def _step(self) -> None:
        for sample in self.engine.step():
            text = self._texts.get(sample)
            if text is None:  # its job has ended in this step
                continue
            try:
                piece = text.piece()
            except Exception as error:
                self._fail([text], error)
                continue
            if piece is not None and piece.finish_reason:
                self._leave(text)
            if piece is not None:
                self._said.append((text.job, piece))

    def _fail(self, texts: Iterable[Text], error: Exception) -> None:
        for job in {id(text.job): text.job for text in texts}.values():
            self._drop(job)
            self._said.append((job, error))

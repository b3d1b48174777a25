"""Generation: prompts in, tokens out, one for every sample at each step; what is asked for meanwhile joins in.

Shapes: n samples that are being generated, T time, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.cache import KVCache, Together
from gptlab.model import GPT, Attention, Block
from gptlab.sampling import Sampling
from gptlab.tokenizer import EOS_ID

PREFILL_TOKENS = 256  # of a prompt, read between two steps of the samples that are under way


class Constraint(Protocol):
    """What may come next, of a sample that must follow a grammar."""

    def allowed(self) -> Tensor:
        """True for each id that may come next, (V,)."""

    def add(self, token: int) -> None: ...


@dataclass(frozen=True)
class Request:
    """What to continue, how far, and how often. Raises ValueError for what cannot be."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1  # samples, of one reading of the prompt
    stop_ids: frozenset[int] = frozenset([EOS_ID])  # end a sample, and are no part of it
    slides: bool = False  # when the context is full, go on with its newer half; otherwise that is the end
    logprobs: int | None = None  # log-probabilities of the tokens, and of so many likeliest besides; None: none
    prompt_logprobs: bool = False  # those of the prompt's tokens too
    allowed: Tensor | None = None  # true for each id that may be drawn, (V,); None: all
    constraint: Callable[[], Constraint] | None = None  # makes one for each sample

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("generation needs at least one token to start from")
        if self.max_tokens < 0 or self.n < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be 0 or more, and n={self.n} at least 1")


@dataclass(frozen=True)
class Logprob:
    """ln p of a token by the network itself, whatever it was drawn by, and the likeliest with theirs."""

    token: int
    value: float | None  # None: of the first token of a prompt, before which there is nothing
    likeliest: list[tuple[int, float]]


class Sample:
    """One continuation of a request's prompt, as far as it has come."""

    def __init__(self, request: Request, number: int):
        self.request, self.number = request, number
        self.ids: list[int] = []  # without the prompt, and without the one that stopped it
        self.logprobs: list[Logprob] = []
        self.prompt_logprobs: list[Logprob] = []
        # stop: by one of stop_ids; length: max_tokens, or a full context; error: by `error`
        self.finish_reason: str | None = None
        self.error: Exception | None = None  # what went wrong with this one, where others may have gone on
        self.generator = request.sampling.generator(number)
        self.constraint = request.constraint() if request.constraint else None
        self.pending: list[int] = []  # tokens that the cache does not hold yet
        self.seen: Tensor | None = None  # which ids were there, where that matters


class Engine:
    """Generates with one network for up to `rows` samples at a time. It belongs to the thread that calls `step`.

    `vocab_size` keeps to the ids that a tokenizer knows, where the network has room for more. `agree` makes one token
    of those that the ranks of a split network have drawn. `decode`, if given, is a faster way to logits (n, V) from one
    token (n, 1) each and the `Together` of their caches.
    """

    def __init__(
        self,
        model: GPT,
        rows: int = 1,
        vocab_size: int | None = None,
        agree: Callable[[int], int] = int,
        decode: Callable[[Tensor, Together], Tensor] | None = None,
    ):
        self.model, self.vocab_size, self.agree = model, vocab_size or model.config.vocab_size, agree
        self.block_size, self.device = model.config.block_size, model.embed.weight.device
        # A compiled network would be compiled again for every new shape; one that is split over ranks needs its hooks.
        self.forward = model if model._compiled_call_impl is None else model.forward
        settings = (self.block_size, model.embed.weight.dtype, self.device)
        # Only gptlab's own attention is known to need nothing of a sequence but its keys, values, mask and positions.
        self.is_batched = rows > 1 and all(
            type(block) is Block and type(block.attention) is Attention for block in model.blocks
        )
        self.cache = KVCache(model.config, rows if self.is_batched else 1, *settings)
        self.rows = self.cache.rows() if self.is_batched else [KVCache(model.config, 1, *settings) for _ in range(rows)]
        self._decode_together = decode or (lambda tokens, together: self._logits(tokens, together)[:, -1])
        self.waiting: deque[list[Sample]] = deque()  # the samples of each request
        self.reading: list[Sample] = []  # those whose prompt is being read, in the last row
        self.active: list[Sample] = []  # number i is in row i

    def add(self, request: Request) -> list[Sample]:
        """Take on a request; its samples grow with each `step`. Raises ValueError for more samples than rows."""
        if request.n > len(self.rows):
            raise ValueError(
                f"n={request.n} samples at a time are more than the {len(self.rows)} that there is room for"
            )
        samples = [Sample(request, number) for number in range(request.n)]
        if len(request.prompt) > self.block_size and not request.slides:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens does not fit into the context of {self.block_size}"
            )
        samples[0].pending = list(request.prompt[-self.block_size :])
        if request.sampling.repetition_penalty != 1:
            for sample in samples:
                sample.seen = torch.zeros(self.vocab_size, dtype=torch.bool)
                sample.seen[[token for token in request.prompt if token < self.vocab_size]] = True
        self.waiting.append(samples)
        return samples

    def cancel(self, sample: Sample, reason: str = "stop") -> None:
        """End a sample, wherever it is."""
        if sample.finish_reason is None:
            sample.finish_reason = reason
        if sample in self.active:
            self._leave(sample)
        for group in (self.reading, *self.waiting):
            if all(one.finish_reason for one in group):
                group.clear()
        self.waiting = deque(group for group in self.waiting if group)

    @property
    def is_idle(self) -> bool:
        return not (self.active or self.reading or self.waiting)

    @torch.no_grad()
    def step(self) -> list[Sample]:
        """A token more for every sample under way, and a piece of the next prompt; those that grew or ended.

        What goes wrong with a sample becomes its `error`, and ends it alone.
        """
        grown = list(self.active)
        if self.active:
            try:
                self._decode()
            except Exception as error:  # what their rows hold now is not known
                self._fail(list(self.active), error)
        if not self.reading and self.waiting and len(self.active) + len(self.waiting[0]) <= len(self.rows):
            self.reading = self.waiting.popleft()
            self.rows[-1].clear()
        if self.reading:
            reading = list(self.reading)
            try:
                grown += self._read()
            except Exception as error:
                self._fail(reading, error)
                grown += reading
        return grown

    def run(self, request: Request) -> Iterator[Sample]:
        """Add a request and step until it is done; its samples, each time one has grown or ended."""
        samples = self.add(request)
        while not all(sample.finish_reason for sample in samples):
            yield from (sample for sample in self.step() if sample in samples)

    def _logits(self, tokens: Tensor, cache: Any, every: bool = False) -> Tensor:
        """Logits (n, 1 or T, V) after the last or every one of `tokens` (n, T)."""

        def readout(x: Tensor, weight: Tensor) -> Tensor:
            return F.linear(x if every else x[:, -1:], weight)[..., : self.vocab_size]

        positions = cache.positions if isinstance(cache, Together) else None
        return self.forward(tokens, positions, cache=cache, readout=readout)

    def _read(self) -> list[Sample]:
        """A piece of a prompt; when it is all there, the first token of each sample."""
        first, row = self.reading[0], self.rows[-1]
        piece, first.pending = first.pending[:PREFILL_TOKENS], first.pending[PREFILL_TOKENS:]
        every = first.request.prompt_logprobs
        logits = self._logits(torch.tensor([piece], device=self.device), row, every)[0]
        if every:
            self._score_prompt(first, logits, row.length)
        if first.pending:
            return []
        samples, self.reading = [one for one in self.reading if one.finish_reason is None], []
        for sample in samples:
            if (place := len(self.active)) < len(self.rows) - 1:
                self.rows[place].copy_from(row)
            self.active.append(sample)
        last = logits[-1].float().cpu()
        for sample in samples:
            self._grow(sample, last)
        return samples

    def _decode(self) -> None:
        """A token more for all that are under way."""
        for place, sample in enumerate(self.active):
            if self.rows[place].length + len(sample.pending) > self.block_size:  # its request slides
                self.rows[place].clear()
                ids = (sample.request.prompt + sample.ids)[-max(1, self.block_size // 2) :]
                sample.pending = ids[-1:]
                if ids[:-1]:
                    self._logits(torch.tensor([ids[:-1]], device=self.device), self.rows[place])
        samples = list(self.active)
        if self.is_batched and len(samples) > 1:
            tokens = torch.tensor([sample.pending for sample in samples], device=self.device)
            together = Together(self.cache, [row.length for row in self.rows[: len(samples)]])
            logits = self._decode_together(tokens, together)
            for row in self.rows[: len(samples)]:
                for layer in row.layers:
                    layer.length += 1
        else:
            alone = [torch.tensor([sample.pending], device=self.device) for sample in samples]
            logits = torch.cat([self._logits(ids, row)[:, -1] for ids, row in zip(alone, self.rows, strict=False)])
        for sample, own in zip(samples, logits.float().cpu(), strict=True):
            self._grow(sample, own)

    def _grow(self, sample: Sample, logits: Tensor) -> None:
        try:
            self._draw(sample, logits)
        except Exception as error:
            self._fail([sample], error)

    def _draw(self, sample: Sample, logits: Tensor) -> None:
        """Draw the next token from `logits` (V,), and end the sample if that is the last."""
        request = sample.request
        if len(sample.ids) == request.max_tokens:
            return self._leave(sample, "length")
        limited = logits
        for allowed in (request.allowed, sample.constraint and sample.constraint.allowed()):
            limited = limited if allowed is None else limited.masked_fill(~allowed, -torch.inf)
        token = self.agree(request.sampling.draw(limited, sample.generator, sample.seen))
        if token in request.stop_ids:
            return self._leave(sample, "stop")
        sample.ids.append(token)
        if request.logprobs is not None:
            sample.logprobs.append(logprob(logits, token, request.logprobs))
        if sample.seen is not None:
            sample.seen[token] = True
        if sample.constraint is not None:
            sample.constraint.add(token)
        sample.pending = [token]
        is_full = self.rows[self.active.index(sample)].length == self.block_size and not request.slides
        if len(sample.ids) == request.max_tokens or is_full:
            self._leave(sample, "length")
        return None

    def _fail(self, samples: list[Sample], error: Exception) -> None:
        """End samples, those under way or those whose prompt is being read."""
        for sample in samples:
            sample.error = sample.error or error
            if sample in self.active:
                self._leave(sample, "error")
            sample.finish_reason = sample.finish_reason or "error"
        self.reading = [sample for sample in self.reading if sample not in samples]
        for place, row in enumerate(self.rows):  # of numbers that are none, nothing may be left
            if place >= len(self.active) and not (self.reading and row is self.rows[-1]):
                row.clear()
            row.wipe()

    def _leave(self, sample: Sample, reason: str | None = None) -> None:
        """Free the row of a sample: the last of those under way moves there."""
        sample.finish_reason = sample.finish_reason or reason
        place, last = self.active.index(sample), self.active.pop()
        if last is not sample:
            self.rows[place].copy_from(self.rows[len(self.active)])
            self.active[place] = last

    def _score_prompt(self, sample: Sample, logits: Tensor, end: int) -> None:
        """Log-probabilities of the prompt's tokens that follow those of `logits` (T, V), the last of which is `end`."""
        prompt, likeliest = sample.request.prompt, sample.request.logprobs or 0
        if not sample.prompt_logprobs:
            sample.prompt_logprobs.append(Logprob(prompt[0], None, []))
        following = prompt[end - len(logits) + 1 : end + 1]
        for token, own in zip(following, logits.float().cpu(), strict=False):
            sample.prompt_logprobs.append(logprob(own, token, likeliest))


def logprob(logits: Tensor, token: int, likeliest: int) -> Logprob:
    """Of `token`, and of so many likeliest, by logits (V,)."""
    values = logits.log_softmax(dim=-1)
    top = values.topk(min(likeliest, len(values)))
    return Logprob(token, float(values[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def generate(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
    stop_id: int | None = None,
    vocab_size: int | None = None,
    agree: Callable[[int], int] = int,
) -> list[int]:
    """The ids that follow `prompt` (T,), up to and without `stop_id`. Same seed, same ids; torch's own is not touched.

    When the context is full, it goes on with its newer half. The network is left in the mode that it was in.
    """
    request = Request(
        prompt.tolist(),
        max_tokens,
        Sampling(temperature=temperature, top_k=top_k, seed=seed),
        stop_ids=frozenset() if stop_id is None else frozenset([stop_id]),
        slides=True,
    )
    was_training = model.training
    model.eval()
    try:
        engine = Engine(model, vocab_size=vocab_size, agree=agree)
        (sample,) = engine.add(request)
        while sample.finish_reason is None:
            engine.step()
    finally:
        model.train(was_training)
    if sample.error is not None:
        raise sample.error
    return sample.ids

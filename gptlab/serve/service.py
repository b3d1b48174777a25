"""One model that answers: requests are admitted, run by the worker, and ended when the client or the time is gone."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from gptlab.loading import Loaded
from gptlab.safety import Safety
from gptlab.serve.errors import ApiError, as_json, unavailable
from gptlab.serve.limits import Admission, Limits, Message, Receive, Send
from gptlab.serve.metrics import Metrics
from gptlab.serve.prepare import Prepared, Preparer, count
from gptlab.serve.schema import Asked, Chat, Completion
from gptlab.serve.shapes import ChatShape, CompletionShape, Shape, event, usage
from gptlab.serve.worker import Job, Piece, Stopped, Worker, log

SEND_TIMEOUT_S = 60.0  # for a reader to take a piece


class Service:
    def __init__(self, loaded: Loaded, name: str, limits: Limits, safety: Safety, metrics: Metrics):
        self.loaded, self.name, self.limits, self.safety, self.metrics = loaded, name, limits, safety, metrics
        self.preparer = Preparer(loaded, limits, safety)
        self.admission = Admission(limits)
        self.worker = Worker(lambda: loaded.engine(limits.parallel), loaded.tokenizer)
        self.is_stopping = False
        metrics.gauges |= {
            "gptlab_samples_active": ("Samples that are being generated.", lambda: self.worker.active),
            "gptlab_samples_waiting": ("Samples that wait for a place.", lambda: self.waiting),
            "gptlab_samples_limit": ("Samples that can be generated at a time.", lambda: limits.parallel),
        }

    @property
    def waiting(self) -> int:
        return max(self.admission.here - self.worker.active, 0)

    def stop(self) -> None:
        """End what is under way, and take nothing more; from any thread, and from a signal's handler."""
        self.is_stopping = True
        self.worker.stop()

    async def answer(self, http: HttpRequest, asked: Asked) -> Response:
        """Raises ApiError for what goes wrong before the first byte is out."""
        if asked.model not in (None, self.name):
            message = f"there is no model {asked.model[:100]!r} here; there is {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        samples = count(asked, self.limits)
        if self.is_stopping or not self.worker.is_alive:
            raise unavailable("the server ends" if self.is_stopping else "the engine has ended; start the server again")
        self.admission.enter(samples)
        try:
            make = self.preparer.chat if isinstance(asked, Chat) else self.preparer.completion
            prepared = await asyncio.to_thread(make, asked)  # tokenizing a long text takes a while
        except BaseException:
            self.admission.leave(samples)
            raise
        self.metrics.counts["gptlab_prompt_tokens_total"] += prepared.prompt_tokens
        run = Run(self, http, asked, prepared, samples)
        shape = self._shape(asked, prepared)
        try:
            first = await run.next()
            if asked.stream:
                return EventStream(run.events(first, shape), run.close)
            pieces = [first, *[await run.next() for _ in range(samples - 1)]]
            content = shape.whole(pieces, usage(prepared.prompt_tokens, run.tokens))
        except BaseException as error:
            run.close()
            raise (run.told(error) if isinstance(error, Exception) else error) from None
        run.close()
        return as_json(content)

    def _shape(self, asked: Asked, prepared: Prepared) -> Shape:
        settings = (self.name, self.loaded.tokenizer, asked.likeliest() is not None, asked.wants_usage)
        if not isinstance(asked, Completion):
            return ChatShape(*settings)
        shape = CompletionShape(*settings)
        shape.n = asked.n or 1
        if asked.echo:
            shape.echoes = prepared.texts
        return shape


class Run:
    """One request under way: pieces of its texts, until all are finished, the client leaves, or the time is up."""

    def __init__(self, service: Service, http: HttpRequest, asked: Asked, prepared: Prepared, samples: int):
        self.service, self.prepared = service, prepared
        self.tokens = 0
        self._left = self._unread = samples  # texts that are not finished; whose end was not read yet
        self._begun, self._has_begun = time.perf_counter(), False
        self._items: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(self._until_gone(http))
        self._timer = loop.call_later(service.limits.timeout_s, self._too_late)
        n = samples // len(prepared.requests)
        blocked = [service.safety.blocks(text) for text in prepared.texts]
        self._indices = [i * n + k for i, is_blocked in enumerate(blocked) if not is_blocked for k in range(n)]
        requests = [one for one, is_blocked in zip(prepared.requests, blocked, strict=True) if not is_blocked]
        self._job = Job(requests, self._hear, asked.stops, service.safety, bool(asked.stream))
        for index in set(range(samples)) - set(self._indices):
            self._arrived(Piece(index, "", 0, "content_filter"))
        service.worker.submit(self._job)

    def _hear(self, item: Piece | Exception) -> None:
        if isinstance(item, Piece):
            item.index = self._indices[item.index]
        self._arrived(item)

    def _arrived(self, item: Piece | Exception) -> None:
        """Count what has come, whether or not the client reads it."""
        if not self._left:  # it has ended, and this was on its way
            return
        if isinstance(item, Exception):
            self._free(self._left)
        elif item.finish_reason:
            self._free(1)
            self.tokens += item.tokens
            self.service.metrics.counts["gptlab_completion_tokens_total"] += item.tokens
        if not self._has_begun:
            self._has_begun = True
            self.service.metrics.first_token_s.add(time.perf_counter() - self._begun)
        self._items.put_nowait(item)

    def _free(self, samples: int) -> None:
        self._left -= samples
        self.service.admission.leave(samples)

    def _too_late(self) -> None:
        message = f"the {self.service.limits.timeout_s:g} s that this server gives to a request are over"
        self._end(ApiError(504, message, code="timeout", headers={"x-should-retry": "false"}), "gptlab_timeouts_total")

    async def _until_gone(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._end(ApiError(499, "the client has left", code="client_left"), "gptlab_cancelled_total")

    def _end(self, error: ApiError, counted: str) -> None:
        if self._left:
            self.service.metrics.counts[counted] += 1
            self.service.worker.cancel(self._job)
            self._arrived(error)

    async def next(self) -> Piece:
        """What comes next, of any of the texts. Raises what has ended all of them."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        self._unread -= item.finish_reason is not None
        return item

    def told(self, error: Exception) -> ApiError:
        """What the client hears of an error: of our own, the words; of any other, that there was one."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Stopped):
            return unavailable(str(error))
        self.service.metrics.counts["gptlab_failures_total"] += 1
        log.error("a request failed", exc_info=error)
        message = str(error) if type(error) is ValueError else "generation failed; the server's log tells why"
        return ApiError(500, message, code="generation_failed")

    async def events(self, piece: Piece, shape: Shape) -> AsyncIterator[bytes]:
        """The stream, `piece` first. An error that comes now is an event."""
        try:
            yield shape.events(piece)
            while self._unread:
                content = shape.events(await self.next())
                while self._unread and not self._items.empty():  # what came while the client was waited for goes as one
                    content += shape.events(await self.next())
                yield content
            yield shape.last(usage(self.prepared.prompt_tokens, self.tokens))
        except Exception as error:
            yield event(self.told(error).body())

    def close(self) -> None:
        """Cancel whatever is left of it."""
        self._watch.cancel()
        self._timer.cancel()
        if self._left:
            self.service.worker.cancel(self._job)
            self._free(self._left)
        else:
            self.service.admission.took(time.perf_counter() - self._begun)


class EventStream(Response):
    """Server-sent events, and what to do after the last. A reader that takes nothing is left by the clock."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.close = events, close

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for content in self.events:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": content, "more_body": True})
        finally:
            self.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

"""How much is let in: who may come, what they may bring, and how many at a time."""

import asyncio
import hmac
import ipaddress
import math
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from gptlab.serve.errors import ApiError
from gptlab.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]

BODY_TIMEOUT_S = 30.0
DRAINED_BYTES = 64 * 2**20  # of a body that is too large, read and dropped, so that its sender hears the answer
MAX_SAMPLES = 256  # of one request: prompts times n


@dataclass(frozen=True)
class Limits:
    """Raises ValueError that names the option, its value, and what it takes."""

    parallel: int = 8  # samples that are generated at a time
    queue: int = 32  # samples that wait besides; then it is 429
    max_tokens: int = 4096  # of one answer
    max_body_kb: int = 2048  # of a request
    timeout_s: float = 600.0  # of a request, in the queue too

    def __post_init__(self) -> None:
        for name, least in (("parallel", 1), ("queue", 0), ("max_tokens", 1), ("max_body_kb", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {getattr(self, name)} must be at least {least}")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"--timeout {self.timeout_s} must be more than 0")


class Admission:
    """Counts the samples that are here, and turns requests away before there are too many."""

    def __init__(self, limits: Limits):
        self.limits, self.here = limits, 0
        self.mean_s = 1.0  # of a request, the later ones counting more

    def enter(self, samples: int) -> None:
        """Raises ApiError 429 where all places are taken; one request may go past the last one by its own samples."""
        if self.here >= self.limits.parallel + self.limits.queue:
            wait_s = math.ceil(self.mean_s * self.here / self.limits.parallel)
            raise ApiError(
                429,
                f"busy: {self.here} samples are under way or waiting; try again later",
                code="queue_full",
                headers={"Retry-After": str(min(max(wait_s, 1), 60))},
            )
        self.here += samples

    def leave(self, samples: int = 1) -> None:
        self.here -= samples

    def took(self, seconds: float) -> None:
        self.mean_s += (seconds - self.mean_s) / 8


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Raises ValueError for a name that means nothing here."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host}: no address of this machine ({error}); 127.0.0.1 is itself") from error
    return all(ipaddress.ip_address(address[4][0].partition("%")[0]).is_loopback for address in found)


def require_key(host: str, key: str | None) -> None:
    """Raises ValueError for an address that others can reach, where no key keeps them out."""
    if key is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from outside: set a key in GPTLAB_API_KEY (or --api-key), or use 127.0.0.1"
        )


class Gate:
    """The outermost of the application: keys, hosts, bodies read whole and no further than the limit, and the counts.

    `hosts`: the names that a server without a key is called by. A page of another site, whose name a hostile DNS makes
    mean this machine, comes with its own name, and is sent away. For the same reason a body must call itself JSON,
    which a page of another site may not send without asking first.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, key: str | None, hosts: frozenset[str]):
        self.app, self.metrics, self.hosts = app, metrics, hosts
        self.key = None if key is None else key.encode()
        self.max_body = limits.max_body_kb * 1024

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [
                    (b"x-request-id", b"req_" + secrets.token_hex(8).encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(scope["path"], headers)
            if scope["method"] == "POST":
                receive = replayed(await self._body(headers, receive), receive)
        except ApiError as error:
            await error.response()(scope, receive, noted)
        except Gone:
            pass
        else:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.request(scope["path"], status, time.perf_counter() - started)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError for who may not come in."""
        if self.key is None:
            host = name_of(headers.get(b"host", b"").decode("latin-1"))
            if host and host not in self.hosts:
                known = ", ".join(sorted(self.hosts))
                message = f"a server without a key is called {known}, and not {host!r}; start it with a key"
                raise ApiError(403, message, code="forbidden_host")
        elif path not in ("/", "/health"):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
                message = "give the server's key, as Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises ApiError for one that is too large, too slow or no JSON, and Gone for half of one."""
        declared = headers.get(b"content-length", b"0")
        is_declared_too_large = int(declared) > self.max_body if declared.isdigit() else False
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                more = not (is_declared_too_large and int(declared) > DRAINED_BYTES)
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    size += len(piece)
                    if size <= self.max_body:
                        parts.append(piece)
                    elif size > DRAINED_BYTES:
                        break
        except TimeoutError:
            message = f"the body took more than {BODY_TIMEOUT_S:.0f} s"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        if is_declared_too_large or size > self.max_body:
            message = f"the body has more than the {self.max_body} bytes that this server takes"
            raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            message = f"the content type is {kind.decode('latin-1') or 'missing'}: send application/json"
            raise ApiError(415, message, code="unsupported_content_type")
        return b"".join(parts)


class Gone(Exception):  # noqa: N818 - nothing went wrong
    """The client has left."""


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of an application to whom the body is given at once."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0][1:].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()

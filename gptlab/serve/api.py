"""The application: its routes, and every error in one shape."""

import asyncio
import base64
import contextlib
import hashlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException as AnyHttpException

from gptlab import __version__
from gptlab.serve.errors import ApiError, as_json
from gptlab.serve.limits import Gate
from gptlab.serve.metrics import CONTENT_TYPE
from gptlab.serve.schema import Chat, Completion
from gptlab.serve.service import Service
from gptlab.serve.worker import log

PAGE = Path(__file__).with_name("page.html")


def build(service: Service, key: str | None = None, hosts: frozenset[str] = frozenset()) -> Gate:
    """The whole application. `hosts`: more names that a server without a key is called by."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop().call_soon_threadsafe)
        yield
        service.stop()

    app = FastAPI(title="gptlab", version=__version__, lifespan=lifespan, openapi_url=None)  # its pages load from afar
    routes(app, service)
    for kind, handle in HANDLERS.items():
        app.add_exception_handler(kind, handle)
    known = frozenset({"localhost", "127.0.0.1", "::1"})
    return Gate(app, service.limits, service.metrics, key, known | hosts)


def routes(app: FastAPI, service: Service) -> None:
    page, headers = PAGE.read_text(encoding="utf-8"), page_headers(PAGE.read_text(encoding="utf-8"))
    created = int(service.loaded.path.stat().st_mtime) if service.loaded.path.exists() else int(time.time())

    def model() -> dict[str, Any]:
        own = {"knows_turns": service.loaded.knows_turns, "context": service.preparer.block_size}
        about = {"id": service.name, "object": "model", "created": created, "owned_by": "gptlab"}
        return about | {"gptlab": own | {"max_tokens": service.preparer.max_tokens}}

    @app.get("/v1/models")
    async def models() -> Response:
        return as_json({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != service.name:
            message = f"there is no model {name[:100]!r} here; there is {service.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return as_json(model())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, Completion.of(await request.body()))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.answer(request, Chat.of(await request.body()))

    @app.get("/health")
    async def health() -> Response:
        is_well = service.worker.is_alive and not service.is_stopping
        state = {"active": service.worker.active, "waiting": service.waiting}
        return as_json({"status": "ok" if is_well else "ended"} | state, 200 if is_well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=headers)


def page_headers(page: str) -> dict[str, str]:
    """What a browser is told: to run the page's own script and style, by their hashes, and to ask this server alone."""
    sources = {}
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        sources[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    policy = [
        "default-src 'none'",
        f"script-src {sources['script']}",
        f"style-src {sources['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


async def own_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def http_error(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router; whatever else."""
    words = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not for this address"}
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    message = words.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message, None, codes.get(error.status_code), headers).response()


async def invalid(request: Request, error: RequestValidationError) -> Response:
    return ApiError(400, str(error), code="invalid_value").response()


async def unforeseen(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return ApiError(500, "an error of the server, whose log tells more", code="internal_error").response()


HANDLERS: dict[Any, Any] = {
    ApiError: own_error,
    AnyHttpException: http_error,
    RequestValidationError: invalid,
    Exception: unforeseen,
}

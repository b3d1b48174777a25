"""What a client is told when something is wrong, in OpenAI's shape."""

import json
from typing import Any

from fastapi.responses import Response

KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class ApiError(Exception):
    """An answer that is an error. `param` names the field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return as_json(self.body(), self.status, self.headers)


def encoded(content: Any) -> bytes:
    """JSON in one line; what no UTF-8 can carry, half a surrogate pair, is a question mark."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(content), status, headers, "application/json")


def unavailable(reason: str) -> ApiError:
    return ApiError(503, reason, code="unavailable", headers={"Retry-After": "5"})

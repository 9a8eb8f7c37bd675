"""Refusals of requests, in the form of OpenAI's errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from ..runtime.printable import one_line

#: Longest message in characters.
_LONGEST = 400


class RefusedError(Exception):
    """A request is refused.

    Args:
        status: HTTP status.
        message: what is wrong and what is expected.
        param: field of the request at fault.
        code: OpenAI's short name of the error.
    """

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, with the message on one line."""
        message = one_line(self)
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer. A busy server asks the client, which by default repeats the request, to wait a second."""
        busy = self.status == HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse(self.body(), self.status, headers={"Retry-After": "1"} if busy else None)


__all__ = ["RefusedError"]

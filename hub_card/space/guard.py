"""Refuse requests that come from other sites, ask for unused routes or are too large."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...runtime.hosts import Hosts
from .uploads import KEPT_UNREAD, MAX_REQUEST, UPLOAD_SECONDS, NoRoomError, UploadFolder

#: Most bytes of a request other than an upload: 14 states and an indication take 5,000.
MAX_JSON = 256 * 2**10

_PREFIX = "/gradio_api/"
#: Routes that the page posts to; Gradio has more, for components and tools that are not on the page.
_POSTED = frozenset({"upload", "queue", "run", "api", "call", "cancel", "reset"})
#: Routes that the page does not use: files of the server, addresses to fetch, and sessions written to disk.
_NOT_SERVED = ("file=", "file/", "proxy=", "stream/", "deep_link")


class Guard:
    """ASGI middleware in front of Gradio's application, which writes uploads to the folder `uploads`."""

    def __init__(self, app: ASGIApp, hosts: Hosts, uploads: UploadFolder):
        self.app, self.hosts, self.uploads = app, hosts, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, changes = Headers(scope=scope), scope["method"] not in ("GET", "HEAD", "OPTIONS")
        route = scope["path"].partition(_PREFIX)[2]
        try:
            refusal = self.hosts.refusal(headers, "this page", changes=changes)
            if refusal is not None:
                raise _Refused(*refusal)
            if route.startswith(_NOT_SERVED) or (changes and route.partition("/")[0] not in _POSTED):
                raise _Refused(HTTPStatus.NOT_FOUND, "this page has no such route")
            if route.startswith("upload") and changes:
                await self._upload(scope, receive, send, headers)
            elif changes:
                await self.app(scope, _replayed(await _small_body(receive), receive), send)
            else:
                await self.app(scope, receive, send)
        except _Refused as refused:
            await PlainTextResponse(str(refused), refused.status)(scope, receive, send)
        except ClientDisconnect:
            pass

    async def _upload(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Accept an upload if there is room, and answer with paths that no other visitor has."""
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "an upload without Content-Length: expected its number of bytes")
        if int(length) > MAX_REQUEST:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{int(length) / 1e6:.0f} MB in one upload: expected at most {MAX_REQUEST / 1e6:.0f} MB",
            )
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        with anyio.move_on_after(UPLOAD_SECONDS):
            try:
                with self.uploads.room(int(length)):
                    await self.app(scope, receive, keep)
            except NoRoomError as error:
                # Browsers show an answer only after they have sent the whole request.
                async for _ in _chunks(receive):
                    pass
                raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
            finally:
                asyncio.get_running_loop().call_later(KEPT_UNREAD + 1, self.uploads.delete_unread)
        if not answer:
            raise _Refused(
                HTTPStatus.REQUEST_TIMEOUT, f"an upload of more than {UPLOAD_SECONDS} s: expected a shorter one"
            )
        status, body = answer[0]["status"], b"".join(message.get("body", b"") for message in answer[1:])
        if status == HTTPStatus.OK:
            paths = json.loads(body)
            moved = {path: self.uploads.make_private(path) for path in set(paths)}
            response: Response = JSONResponse([moved[path] for path in paths])
        else:
            response = PlainTextResponse(body, status)
        await response(scope, receive, send)


class _Refused(Exception):
    """A request is refused, with this status and reason."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the body of a request, in parts; `ClientDisconnect` if the client goes away."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _small_body(receive: Receive) -> bytes:
    """The body of a request other than an upload; refused if too large or with a URL, which Gradio would fetch."""
    body = b""
    async for chunk in _chunks(receive):
        body += chunk
        if len(body) > MAX_JSON:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request of more than {MAX_JSON:,} bytes: expected less",
            )
    try:
        parts = [json.loads(body or b"null")]
    except (ValueError, RecursionError) as error:
        raise _Refused(HTTPStatus.BAD_REQUEST, "the request is not JSON") from error
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if str(part.get("path")).startswith(("http://", "https://")):
                raise _Refused(HTTPStatus.BAD_REQUEST, "a file at a URL: expected an uploaded file")
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body which has already been read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay

"""What a server checks before it looks into a request: who asks, how large it is, and how many others there are."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.hosts import Hosts
from .errors import RefusedError

#: Environment variable with a key that clients must send, as OpenAI's do.
KEY_VARIABLE = "OTDRG_API_KEY"


@dataclass
class Limits:
    """
    Args:
        requests: most requests that are read, wait or are answered at the same time.
        images: most views of a study.
        image_bytes: largest view in bytes.
        body_bytes: largest request in bytes.
        held_bytes: bytes of all requests that are arriving or waiting to be read.
        seconds: longest time that a request may take to arrive.
    """

    requests: int = 32
    images: int = 4
    image_bytes: int = 64 * 2**20
    body_bytes: int = 128 * 2**20
    held_bytes: int = 256 * 2**20
    seconds: float = 120


class Gate:
    """ASGI middleware that reads requests within limits, and refuses others.

    Args:
        app: the application. It calls `scope["free"]()` when it does not need the body of a request any more.
        hosts: names of this server.
        limits: of requests.
        key: what clients must send as their API key; None for none.
        origins: web pages that may ask, such as "https://viewer.example".
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, limits: Limits, key: str | None = None, origins: Iterable[str] = ()):
        self.app, self.hosts, self.limits, self.key, self.origins = app, hosts, limits, key, frozenset(origins)
        self.requests = self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        incoming = _Incoming(receive)
        try:
            self._check_sender(Headers(scope=scope), scope["path"])
            if scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            with self._admitted(), self._share() as share:
                body = await self._read(incoming, share)
                await self.app({**scope, "free": share.free}, _replayed(body, receive), send)
        except RefusedError as refused:
            if refused.status != HTTPStatus.REQUEST_TIMEOUT:
                # Clients read an answer only after they have sent the whole request.
                with suppress(TimeoutError, _Left):
                    async with asyncio.timeout(self.limits.seconds):
                        while not incoming.complete:
                            await incoming()
            await refused.response()(scope, receive, send)
        except _Left:
            pass

    def _check_sender(self, headers: Headers, path: str) -> None:
        refusal = self.hosts.refusal(headers, "one of --allow-origin", self.origins)
        if refusal is not None:
            raise RefusedError(*refusal)
        given = headers.get("authorization", "").partition("Bearer ")[2]
        if self.key and path != "/health" and not hmac.compare_digest(given.encode(), self.key.encode()):
            message = f"wrong or no API key: expected the {KEY_VARIABLE} of the server"
            raise RefusedError(HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key")

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.requests >= self.limits.requests:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self.requests} requests are waiting already: try again later",
                code="queue_full",
            )
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def _share(self) -> Iterator[_Share]:
        share = _Share(self)
        try:
            yield share
        finally:
            share.free()

    async def _read(self, incoming: _Incoming, share: _Share) -> list[bytes]:
        """The body of a request, in parts."""
        chunks: list[bytes] = []
        limits = self.limits
        try:
            async with asyncio.timeout(limits.seconds):
                while not incoming.complete:
                    chunks.append(await incoming())
                    share.add(len(chunks[-1]))
        except RefusedError:
            chunks.clear()  # the error refers to this frame, and the rest of the request is still to be read
            raise
        except TimeoutError as error:
            raise RefusedError(
                HTTPStatus.REQUEST_TIMEOUT, f"the request did not arrive within {limits.seconds:g} seconds"
            ) from error
        return chunks


class _Share:
    """The bytes of one request among those that are held."""

    def __init__(self, gate: Gate):
        self.gate, self.size = gate, 0

    def add(self, size: int) -> None:
        limits = self.gate.limits
        if self.size + size > limits.body_bytes:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request of more than {limits.body_bytes:,} bytes: expected less",
            )
        if self.gate.held + size > limits.held_bytes:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "no room for another request while others are arriving: try again later",
                code="queue_full",
            )
        self.size, self.gate.held = self.size + size, self.gate.held + size

    def free(self) -> None:
        self.size, self.gate.held = 0, self.gate.held - self.size


class _Incoming:
    """Receives the body of a request, in parts, until it is complete."""

    def __init__(self, receive: Receive):
        self.receive, self.complete = receive, False

    async def __call__(self) -> bytes:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise _Left
        self.complete = not message.get("more_body", False)
        return message.get("body", b"")


class _Left(Exception):
    """The client has gone away."""


def _replayed(chunks: list[bytes], receive: Receive) -> Receive:
    """A `receive` that returns a body which has already been read, and keeps no part of it."""

    async def replay() -> Message:
        if not chunks:
            return await receive()
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    return replay


__all__ = ["KEY_VARIABLE", "Gate", "Limits"]

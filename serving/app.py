"""The routes of the server: chat completions, the model and its health."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..runtime.hosts import Hosts
from ..runtime.interruptions import is_out_of_memory
from .errors import RefusedError
from .gate import Gate, Limits
from .requests import Asked, read_request
from .writer import Job, ReportWriter

_LOG = logging.getLogger(__name__)

ROUTES = "/v1/chat/completions, /v1/models or /health"


def build_app(
    writer: ReportWriter,
    name: str,
    hosts: Hosts,
    limits: Limits | None = None,
    key: str | None = None,
    origins: Iterable[str] = (),
) -> FastAPI:
    """Build the server of one model; requests and reports are kept in memory only, and not logged.

    Args:
        writer: writes the reports; it is not closed.
        name: name of the model in requests.
        hosts, key, origins: who may ask, as in [`Gate`].
        limits: of requests; by default those of [`Limits`].
    """
    limits, origins, created = limits or Limits(), list(origins), int(time.time())
    # The pages of the documentation would load scripts from elsewhere.
    app = FastAPI(title="OTDRG", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, hosts=hosts, limits=limits, key=key, origins=origins)
    # The outermost, so that a page can read refusals as well.
    app.add_middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
    )
    completions = Completions(writer, name, limits)
    model = {"id": name, "object": "model", "created": created, "owned_by": "otdrg"}

    @app.get("/health")
    async def health() -> Response:
        if not writer.is_alive:
            return JSONResponse({"status": "the writer of reports has ended"}, HTTPStatus.INTERNAL_SERVER_ERROR)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> Response:
        if asked != name:
            raise RefusedError(
                HTTPStatus.NOT_FOUND, f"model {asked!r}: unknown, expected {name!r}", "model", "model_not_found"
            )
        return JSONResponse(model)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await completions.answer(request)

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, refused: RefusedError) -> Response:
        return refused.response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {request.url.path}"[:200]
        return RefusedError(HTTPStatus(error.status_code), f"no route {path}: expected {ROUTES}").response()

    return app


class Completions:
    """Answers chat completions.

    Args:
        writer: writes the reports.
        name: name of the model.
        limits: of requests.
    """

    def __init__(self, writer: ReportWriter, name: str, limits: Limits):
        self.writer, self.name, self.limits = writer, name, limits
        # Reading a view takes up to 1 GB: one at a time.
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="view-reader")

    async def answer(self, request: Request) -> Response:
        """The answer to a request; raises [`RefusedError`]."""
        asked = await self._read(request)
        events: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Any) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        job: Job | None = Job(asked, put)
        self.writer.submit(job)
        identity = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        try:
            event = await _unless_left(request, events.get())
            if isinstance(event, Exception):
                raise _refusal(event)
            if asked.stream:
                stream, job = self._stream(job, event, events, identity), None  # the stream ends the job
                return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            return JSONResponse(self._completion(asked, event, identity))
        finally:
            if job is not None:
                self.writer.leave(job)

    async def _read(self, request: Request) -> Asked:
        loop, processor = asyncio.get_running_loop(), self.writer.pipe.processor
        body = [b"".join([chunk async for chunk in request.stream()])]
        try:
            # Popped, so that nothing keeps the body while the views are read.
            asked = await loop.run_in_executor(
                self.reader, lambda: read_request(body.pop(), self.name, processor, self.limits)
            )
        except RefusedError:
            raise
        except Exception as error:  # any: decoders raise errors of any type
            raise _refusal(error) from error
        finally:
            request.scope["free"]()
        if asked.sampling and not self.writer.samples:
            raise RefusedError(
                HTTPStatus.BAD_REQUEST,
                f"temperature={asked.sampling['temperature']:g}: expected 0 or nothing, this server chooses each "
                "report among candidates",
                "temperature",
            )
        return asked

    async def _stream(self, job: Job, event: Any, events: asyncio.Queue, identity: dict) -> AsyncIterator[str]:
        """The parts of a report as server-sent events, from the first event on."""
        sent, role = "", {"role": "assistant"}
        try:
            yield self._part(identity, {**role, "content": ""})
            while isinstance(event, str):
                if len(event) > len(sent):
                    yield self._part(identity, {"content": event[len(sent) :]})
                    sent = event
                event = await events.get()
            if isinstance(event, Exception):
                yield _event(_refusal(event).body())
                return
            rest = event["generated_text"][len(sent) :]
            if rest:
                yield self._part(identity, {"content": rest})
            yield self._part(identity, {}, _finish_reason(event), otdrg=_extras(event))
            if job.asked.include_usage:
                usage = self._usage(job.asked, event)
                yield _event({**identity, "object": "chat.completion.chunk", "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            self.writer.leave(job)

    def _part(self, identity: dict, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**identity, "object": "chat.completion.chunk", "choices": [choice], **more})

    def _completion(self, asked: Asked, record: dict[str, Any], identity: dict) -> dict[str, Any]:
        message = {"role": "assistant", "content": record["generated_text"], "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(record)}
        return {
            **identity,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(asked, record),
            "otdrg": _extras(record),
        }

    def _usage(self, asked: Asked, record: dict[str, Any]) -> dict[str, int]:
        """The number of tokens of the prompt, image tokens among them, and of the report with its end."""
        tokenizer = self.writer.pipe.processor.tokenizer
        written = len(tokenizer(record["generated_text"], add_special_tokens=False)["input_ids"]) + record["complete"]
        total = asked.prompt_tokens + written
        return {"prompt_tokens": asked.prompt_tokens, "completion_tokens": written, "total_tokens": total}


async def _unless_left(request: Request, event: Awaitable[Any]) -> Any:
    """Wait for an event; `RefusedError`, which nobody reads, if the client goes away before."""
    waiting, leaving = asyncio.ensure_future(event), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the client has gone away")
    finally:
        waiting.cancel()
        leaving.cancel()


def _refusal(error: Exception) -> RefusedError:
    """The refusal of a request that caused an error."""
    if isinstance(error, ValueError):
        return RefusedError(HTTPStatus.BAD_REQUEST, str(error))
    if is_out_of_memory(error):
        return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "out of memory: try again later, or with smaller images")
    # Without the message, which may quote the request.
    _LOG.error("an answer failed (%s):\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return RefusedError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        f"the report could not be written ({type(error).__name__}): see the log of the server",
    )


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _finish_reason(record: dict[str, Any]) -> str:
    return "stop" if record["complete"] else "length"


def _extras(record: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline says beside the report: findings, contradictions and, with a bank, `retrieved`."""
    return {name: value for name, value in record.items() if name not in ("generated_text", "complete")}


__all__ = ["Completions", "build_app"]

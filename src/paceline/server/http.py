"""HTTP responses: JSON, server-sent events, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from paceline.errors import MAX_MESSAGE, BusyError, ContextError, PacelineError, StoppingError, shorten
from paceline.server.runner import EngineFault, RunningRequest

logger = logging.getLogger("paceline")

KEEP_ALIVE_SECONDS = 15.0
CLIENT_DISCONNECTED = 499  # only in logs: the client has gone
MAX_PARAM = 200  # characters


STATUS_AND_CODE: tuple[tuple[type[PacelineError], int, str | None], ...] = (  # subclasses first
    (StoppingError, 503, "stopping"),
    (BusyError, 429, "queue_full"),
    (ContextError, 400, "context_length_exceeded"),
    (PacelineError, 400, None),
)


class Json(JSONResponse):
    """JSON in ASCII, so that lone surrogates can be sent too."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's format. Message and parameter may quote values of any size, and are shortened."""
    kinds = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = param and shorten(param, MAX_PARAM)
    return {"error": {"message": shorten(message, MAX_MESSAGE), "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Json:
    """See `error_body`."""
    return Json(error_body(status, message, param, code), status, headers=headers)


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body for an error."""
    for kind, status, code in STATUS_AND_CODE:
        if isinstance(error, kind):
            return status, error_body(status, str(error), code=code)
    if isinstance(error, TimeoutError):
        return 408, error_body(408, "the request took longer than the server allows; ask for less", code="timeout")
    if not isinstance(error, EngineFault):
        logger.error("a request failed", exc_info=error)
    return 500, error_body(500, "internal error; see the server's log")


def failure(error: BaseException) -> Json:
    """An error response, for errors before the first byte of an answer."""
    status, body = describe(error)
    return Json(body, status, headers={"retry-after": "1"} if status in (429, 503) else None)


class EventStream(StreamingResponse):
    """Server-sent events. The running request is closed at the end, and when the client disconnects."""

    def __init__(
        self, running: RunningRequest, chunks: AsyncIterator[dict[str, Any] | str | None], headers: dict[str, str]
    ) -> None:
        self._running = running
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(_lines(chunks), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.close()


async def _lines(chunks: AsyncIterator[dict[str, Any] | str | None]) -> AsyncIterator[bytes]:
    """Chunks as lines: an object as JSON (its `type`, if any, is the event's name), a string as is, None a comment."""
    try:
        async for chunk in chunks:
            yield _line(chunk)
    except Exception as error:
        yield _line(describe(error)[1])


def _line(chunk: dict[str, Any] | str | None) -> bytes:
    if chunk is None:
        return b": waiting\n\n"
    if isinstance(chunk, str):
        return f"data: {chunk}\n\n".encode()
    name = f"event: {chunk['type']}\n" if isinstance(chunk.get("type"), str) else ""
    return f"{name}data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()


async def respond(request: Request, running: RunningRequest, answer: Coroutine[Any, Any, Response]) -> Response:
    """Await the answer, or stop when the client disconnects. The running request is closed either way."""
    work, disconnected = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=CLIENT_DISCONNECTED)
        return work.result()
    except Exception as error:
        return failure(error)
    finally:
        running.close()
        for task in (work, disconnected):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

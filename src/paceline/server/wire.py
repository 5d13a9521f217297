"""How answers go over the wire: JSON, server-sent events, and OpenAI's errors."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from paceline.errors import BusyError, ContextError, PacelineError, StoppingError
from paceline.server.runner import EngineFault, Job

logger = logging.getLogger("paceline")

KEEP_ALIVE_SECONDS = 15.0
CLIENT_GONE = 499  # never sent: nobody is there


REFUSALS: tuple[tuple[type[PacelineError], int, str | None], ...] = (  # the first that fits
    (StoppingError, 503, "stopping"),
    (BusyError, 429, "queue_full"),
    (ContextError, 400, "context_length_exceeded"),
    (PacelineError, 400, None),
)


class Json(JSONResponse):
    """JSON in ASCII, so that any string can be sent: half a surrogate pair, too."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


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
    """Status and body for what went wrong with a request."""
    for kind, status, code in REFUSALS:
        if isinstance(error, kind):
            return status, error_body(status, str(error), code=code)
    if isinstance(error, TimeoutError):
        return 408, error_body(408, "the request took longer than the server allows; ask for less", code="timeout")
    if not isinstance(error, EngineFault):
        logger.error("a request failed", exc_info=error)
    return 500, error_body(500, "the server failed at this request; its log says why")


def failure(error: BaseException) -> Json:
    """An error response for what went wrong before an answer began."""
    status, body = describe(error)
    return Json(body, status, headers={"retry-after": "1"} if status in (429, 503) else None)


class EventStream(StreamingResponse):
    """Server-sent events of a job, which is closed when the client has gone or the answer is whole."""

    def __init__(self, job: Job, chunks: AsyncIterator[dict[str, Any] | str | None], headers: dict[str, str]) -> None:
        self._job = job
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(_lines(chunks), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _lines(chunks: AsyncIterator[dict[str, Any] | str | None]) -> AsyncIterator[bytes]:
    """Chunks as lines: an object as data (its `type`, if any, names the event), a word as it is, None a comment."""
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


async def answer_unless_gone(request: Request, job: Job, answer: Coroutine[Any, Any, Response]) -> Response:
    """The answer, or nothing if the client has gone before; the job is closed either way."""
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=CLIENT_GONE)
        return work.result()
    except Exception as error:
        return failure(error)
    finally:
        job.close()
        for task in (work, gone):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

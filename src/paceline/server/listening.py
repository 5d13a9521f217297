"""The HTTP server: uvicorn, with limits on connections and on their time, and an end within a time of grace."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from paceline.server.bodies import MAX_BODY_SECONDS

MAX_CONNECTIONS = 512
MAX_READ = 16 << 10  # bytes parsed at once: of tiny chunks, more would hold up the event loop
MAX_STANDSTILL = 120.0  # seconds in which a client reads nothing of what is ready for it
CUT_SECONDS = 1.0  # for last events, once the time of grace is over
LIMITS = {h11.IDLE: 15.0, h11.SEND_BODY: MAX_BODY_SECONDS + 1}  # seconds until headers, and then the body, are whole
FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\nretry-after: 1\r\n\r\n"


class Connection(H11Protocol):
    """A connection that is closed when a request does not arrive in time, or its answer is not read."""

    _phase: Any = None  # what is awaited from the client
    _timer: asyncio.TimerHandle | None = None
    _standstill: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether it is open, and no request is being answered."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = MAX_READ
        if len(self.connections) > MAX_CONNECTIONS:
            others = (other for other in self.connections if isinstance(other, Connection) and other is not self)
            idle = next((other for other in others if other.idle), None)
            if idle is None:
                transport.write(FULL)
                transport.close()
                return
            idle.transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._standstill):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._standstill = self.loop.call_later(MAX_STANDSTILL, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._standstill:
            self._standstill.cancel()

    def _watch(self) -> None:
        """Start the time limit of what the client sends next. Between requests, uvicorn's own limit holds."""
        phase = self.conn.their_state
        if phase is self._phase:
            return
        self._phase = phase
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(LIMITS[phase], self._expire) if phase in LIMITS else None

    def _expire(self) -> None:
        if self.idle:
            self.transport.close()
        elif self.cycle:
            self.cycle.keep_alive = False  # closed after the answer


class Server(uvicorn.Server):
    """Serves an application, and ends within a time of grace.

    Args:
        app: made by `create_app`.
        grace: seconds to finish running and queued requests when the server is stopped; what is unfinished then ends
            with an error.
    """

    def __init__(self, app: FastAPI, grace: float) -> None:
        self._service, self._grace = app.state.service, grace
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=grace + CUT_SECONDS,  # type: ignore[arg-type]
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: object) -> None:
        """The first signal stops the server after running requests, a second one at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit:  # requests are cut off, which would be logged as failures, with tracebacks
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def shutdown(self, sockets: Any = None) -> None:
        """Refuse what has not arrived, finish what is running."""
        self._service.bodies.stop()
        end = asyncio.get_running_loop().call_later(self._grace, self._service.runner.abort)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

"""Runs the scheduler on the engine's thread, and delivers its events to the server's event loop.

A `RunningRequest` has one or more sequences. Closing it before its end frees its cache slots before the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items

from paceline.engine.engine import Engine, Request
from paceline.engine.sequence import Sequence
from paceline.errors import PacelineError, SettingsError, StoppingError
from paceline.server.metrics import Metrics
from paceline.types import Event

logger = logging.getLogger("paceline")


STOP_SECONDS = 0.02  # between looks whether all requests have finished


class EngineFault(Exception):
    """The engine failed in the middle of a request: a defect, not a user's error."""


class RunningRequest:
    """The sequences of one request, from submission to the end."""

    def __init__(self, runner: Runner, count: int) -> None:
        self.sequences: list[Sequence] = []
        self.timer: asyncio.TimerHandle | None = None
        self._runner = runner
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._unread = set(range(count))  # whose last event was not yet returned by `events`
        self._running = set(self._unread)  # not finished in the engine

    def put(self, index: int, event: Event | Exception) -> None:
        """Add an event, or the error that ended the request. Called on the event loop."""
        if isinstance(event, Event) and event.finish:
            self._running.discard(index)
        self._events.put_nowait((index, event))

    def expire(self) -> None:
        """Cancel the request because its time is up."""
        if self._running:
            self.close()
            self.put(0, TimeoutError())

    async def events(self, max_wait: float = 1e9) -> AsyncIterator[tuple[int, Event] | None]:
        """All events as (index of the sequence, event); None after each `max_wait` seconds without one.

        Raises:
            TimeoutError: the request took longer than the server allows.
            EngineFault: the engine failed.
        """
        while self._unread:
            try:
                async with asyncio.timeout(max_wait):
                    index, event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                raise event
            if event.finish:
                self._unread.discard(index)
            yield index, event

    def close(self) -> None:
        """Cancel unfinished sequences. May be called more than once."""
        if self.timer:
            self.timer.cancel()
        self._runner.release([self.sequences[index] for index in self._running], self)
        self._running = set()


Delivery = tuple[RunningRequest, int, Event | Exception]


class Runner:
    """Keeps the engine stepping while there is work, and delivers its events to the server's event loop.

    Args:
        engine: a loaded pair.
        metrics: counts all events.
        max_seconds: time limit of a request.
    """

    def __init__(self, engine: Engine, metrics: Metrics, max_seconds: float) -> None:
        self.engine = engine
        self._metrics, self._max_seconds = metrics, max_seconds
        self._stopping = self._stepping = False
        self._undelivered: list[Delivery] = []
        self._requests: set[RunningRequest] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Events go to the running event loop."""
        self._loop, self._stopping = asyncio.get_running_loop(), False

    async def stop(self) -> None:
        """Refuse new requests, and return when the running ones have finished."""
        self._stopping = True
        while self._requests:
            await asyncio.sleep(STOP_SECONDS)
        await self.engine.background.wait(self.engine.scheduler.sweep)

    def abort(self) -> None:
        """End all running requests with an error, after what was delivered so far."""
        for running in list(self._requests):
            running.close()
            running.put(0, StoppingError("the server has stopped before the answer was complete; try again later"))

    def submit(self, prompts: Items[tuple[list[int], Request]], client: str = "") -> RunningRequest:
        """Submit the prompts of a request to the engine, each with its settings.

        Args:
            prompts: token ids and settings of each sequence.
            client: whom the queue counts them to.

        Raises:
            BusyError: the queue is full, or the server is stopping.
            SettingsError: a setting out of range, or more sequences than slots and queue can hold.
        """
        if self._stopping:
            raise StoppingError("the server is stopping; try again later")
        assert self._loop is not None
        scheduler = self.engine.scheduler
        if len(prompts) > scheduler.backend.info.slots + scheduler.max_waiting:
            raise SettingsError(f"{len(prompts)} choices in one request are more than this server takes; ask for fewer")
        running = RunningRequest(self, len(prompts))
        try:
            for index, (tokens, request) in enumerate(prompts):
                deliver = self._deliver(running, index)
                running.sequences.append(self.engine.submit(tokens, request, deliver, client=client))
        except PacelineError:
            for sequence in running.sequences:
                scheduler.cancel(sequence)
            raise
        self._requests.add(running)
        running.timer = self._loop.call_later(self._max_seconds, running.expire)
        self.engine.background.post(self._wake)
        return running

    def release(self, sequences: Items[Sequence], running: RunningRequest) -> None:
        """Cancel a request's unfinished sequences before the next step."""
        self._requests.discard(running)
        for sequence in sequences:
            self.engine.scheduler.cancel(sequence)
            self._metrics.forget(sequence)
        self.engine.background.post(self._wake)

    def _deliver(self, running: RunningRequest, index: int) -> Callable[[Event | Exception], None]:
        return lambda event: self._undelivered.append((running, index, event))

    def _wake(self) -> None:
        """Step, on the engine's thread, until nothing is left to do."""
        if not self._stepping:
            self._stepping = True
            self._step()

    def _step(self) -> None:
        self.engine.scheduler.tick()
        deliveries, self._undelivered = self._undelivered, []
        if deliveries and self._loop:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._dispatch, deliveries)
        if self.engine.scheduler.busy:
            self.engine.background.post(self._step)  # after what others have posted meanwhile
        else:
            self._stepping = False

    def _dispatch(self, deliveries: list[Delivery]) -> None:
        for running, index, event in deliveries:
            if running not in self._requests:  # closed in the meantime
                continue
            sequence = running.sequences[index]
            if isinstance(event, Event):
                running.put(index, event)
                self._metrics.observe(sequence, event)
                if event.finish:
                    self._metrics.forget(sequence)
            else:
                self._fail(running, event)

    def _fail(self, running: RunningRequest, error: Exception) -> None:
        if not isinstance(error, PacelineError):
            logger.error("the engine failed; all running requests have been aborted", exc_info=error)
            error = EngineFault()
        running.close()
        running.put(0, error)

"""Runs the scheduler loop on a thread, and delivers its events to the server's event loop.

A `RunningRequest` has one or more sequences. Closing it before its end frees its cache slots before the next step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items

from paceline.engine.engine import Engine, Request
from paceline.engine.sequence import Sequence
from paceline.errors import BusyError, PacelineError, SettingsError, StoppingError
from paceline.server.metrics import Metrics
from paceline.types import Event

logger = logging.getLogger("paceline")


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
    """Runs the engine on a thread.

    Args:
        engine: a loaded pair.
        metrics: counts all events.
        max_seconds: time limit of a request.
    """

    def __init__(self, engine: Engine, metrics: Metrics, max_seconds: float) -> None:
        self.engine = engine
        self._metrics, self._max_seconds = metrics, max_seconds
        self._wake = threading.Condition()
        self._stopping = False
        self._undelivered: list[Delivery] = []
        self._requests: set[RunningRequest] = set()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread; events go to the running event loop."""
        self._loop, self._stopping = asyncio.get_running_loop(), False
        self._thread = threading.Thread(target=self._run, name="paceline-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Finish all running requests, then end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread:
            await asyncio.to_thread(self._thread.join)

    def submit(self, prompts: Items[tuple[list[int], Request]], client: str = "") -> RunningRequest:
        """Submit the prompts of a request to the engine, each with its settings.

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
        if len(prompts) > scheduler.room:
            raise BusyError(f"the queue is full ({scheduler.waiting} requests are waiting); try again later")
        running = RunningRequest(self, len(prompts))
        try:
            for index, (tokens, request) in enumerate(prompts):
                running.sequences.append(self.engine.submit(tokens, request, self._deliver(running, index)))
        except PacelineError:
            for sequence in running.sequences:
                scheduler.cancel(sequence)
            raise
        self._requests.add(running)
        running.timer = self._loop.call_later(self._max_seconds, running.expire)
        self._notify()
        return running

    def release(self, sequences: Items[Sequence], running: RunningRequest) -> None:
        """Cancel a request's unfinished sequences before the next step."""
        self._requests.discard(running)
        for sequence in sequences:
            self.engine.scheduler.cancel(sequence)
            self._metrics.forget(sequence)
        self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _deliver(self, running: RunningRequest, index: int) -> Callable[[Event], None]:
        return lambda event: self._undelivered.append((running, index, event))

    def _run(self) -> None:
        scheduler = self.engine.scheduler
        while True:
            with self._wake:
                self._wake.wait_for(lambda: scheduler.busy or self._stopping)
                if not scheduler.busy:
                    return
            try:
                scheduler.tick()
            except Exception:
                logger.exception("the engine failed; all running requests have been aborted")
                scheduler.abandon()
                self._undelivered = [(running, 0, EngineFault()) for running in list(self._requests)]
            deliveries, self._undelivered = self._undelivered, []
            if deliveries:
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._dispatch, deliveries)

    def _dispatch(self, deliveries: list[Delivery]) -> None:
        for running, index, event in deliveries:
            if running not in self._requests:  # closed in the meantime
                continue
            running.put(index, event)
            if isinstance(event, Event):
                sequence = running.sequences[index]
                self._metrics.observe(sequence, event)
                if event.finish:
                    self._metrics.forget(sequence)

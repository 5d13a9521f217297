"""The engine's thread: it turns the scheduler, and carries what comes out to the server's event loop.

A request is a `Job` of one or more sequences. Whoever leaves a job before its end closes it, and its cache slots are
free before the next round.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items
from typing import Protocol

from paceline.engine.engine import Engine, Request
from paceline.engine.sequence import Sequence
from paceline.errors import BusyError, PacelineError, SettingsError, StoppingError
from paceline.types import Event

logger = logging.getLogger("paceline")


class Observer(Protocol):
    """Told of what happens, on the event loop."""

    def observe(self, sequence: Sequence, event: Event) -> None:
        """A round."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended, or was left."""


class EngineFault(Exception):
    """The engine broke down in the middle of a request: a defect, not the user's fault."""


class Job:
    """Sequences of one request, in flight. Iterate for (index, event), in the order in which they come."""

    def __init__(self, runner: Runner, count: int) -> None:
        self.sequences: list[Sequence] = []
        self.timer: asyncio.TimerHandle | None = None
        self._runner = runner
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._left = set(range(count))  # not read to their ends
        self._running = set(self._left)

    def put(self, index: int, event: Event | Exception) -> None:
        """Hand over an event, or why there will be no more. Called on the event loop."""
        if isinstance(event, Event) and event.finish:
            self._running.discard(index)
        self._events.put_nowait((index, event))

    def expire(self) -> None:
        """The request has taken its time: stop, whether or not anybody reads."""
        if self._running:
            self.close()
            self.put(0, TimeoutError())

    async def events(self, most_wait: float = 1e9) -> AsyncIterator[tuple[int, Event] | None]:
        """All events; None where none came for `most_wait` seconds.

        Raises:
            TimeoutError: the request has taken its time.
            EngineFault: the engine broke down.
        """
        while self._left:
            try:
                async with asyncio.timeout(most_wait):
                    index, event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                raise event
            if event.finish:
                self._left.discard(index)
            yield index, event

    def close(self) -> None:
        """Stop what is still running. May be called again."""
        if self.timer:
            self.timer.cancel()
        self._runner.release([self.sequences[index] for index in self._running], self)
        self._running = set()


class Runner:
    """Runs the engine on a thread of its own while there is work.

    Args:
        engine: a loaded pair.
        observer: told of what happens.
        most_seconds: a request may take.
    """

    def __init__(self, engine: Engine, observer: Observer, most_seconds: float) -> None:
        self.engine = engine
        self._observer, self._most_seconds = observer, most_seconds
        self._wake = threading.Condition()
        self._stopping = False
        self._outbox: list[tuple[Job, int, Event | Exception]] = []
        self._jobs: set[Job] = set()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin, for the event loop that runs now."""
        self._loop, self._stopping = asyncio.get_running_loop(), False
        self._thread = threading.Thread(target=self._run, name="paceline-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Finish what is in flight, then end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread:
            await asyncio.to_thread(self._thread.join)

    def submit(self, requests: Items[tuple[list[int], Request]]) -> Job:
        """Let prompts run, each with its settings.

        Raises:
            BusyError: too many requests wait already, or the server is being stopped.
            SettingsError: a setting out of range, or more sequences than can ever run and wait.
        """
        if self._stopping:
            raise StoppingError("the server is being stopped; try another one, or later")
        assert self._loop is not None
        scheduler = self.engine.scheduler
        if len(requests) > scheduler.backend.info.slots + scheduler.max_waiting:
            raise SettingsError(f"{len(requests)} texts in one request are more than this server takes; ask for fewer")
        if len(requests) > scheduler.room:
            raise BusyError(f"{scheduler.waiting} requests are waiting already; try again later")
        job = Job(self, len(requests))
        try:
            for index, (tokens, request) in enumerate(requests):
                job.sequences.append(self.engine.submit(tokens, request, self._deliver(job, index)))
        except PacelineError:
            for sequence in job.sequences:
                scheduler.cancel(sequence)
            raise
        self._jobs.add(job)
        job.timer = self._loop.call_later(self._most_seconds, job.expire)
        self._notify()
        return job

    def release(self, sequences: Items[Sequence], job: Job) -> None:
        """Take a job's unfinished sequences out before their next round."""
        self._jobs.discard(job)
        for sequence in sequences:
            self.engine.scheduler.cancel(sequence)
            self._observer.forget(sequence)
        self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _deliver(self, job: Job, index: int) -> Callable[[Event], None]:
        return lambda event: self._outbox.append((job, index, event))

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
                logger.exception("the engine broke down; the requests in flight have failed")
                self._outbox.clear()
                scheduler.abandon()
                self._hand_over([(job, 0, EngineFault()) for job in list(self._jobs)])
            outbox, self._outbox = self._outbox, []
            if outbox:
                self._hand_over(outbox)

    def _hand_over(self, outbox: list[tuple[Job, int, Event | Exception]]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._dispatch, outbox)

    def _dispatch(self, outbox: list[tuple[Job, int, Event | Exception]]) -> None:
        for job, index, event in outbox:
            if job not in self._jobs:  # left meanwhile
                continue
            job.put(index, event)
            if isinstance(event, Event):
                self._observer.observe(job.sequences[index], event)
                if event.finish:
                    self._observer.forget(job.sequences[index])

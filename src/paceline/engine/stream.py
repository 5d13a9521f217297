"""A generation in flight, as users hold it: an iterator of events, for threads and for coroutines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from paceline.types import Event, Generation, SamplingParams, Statistics

if TYPE_CHECKING:
    from paceline.engine.engine import Engine, Request

BURST_SECONDS = 0.02  # that steps run for a caller who waits for the whole text; then it is others' turn


class Stream:
    """A generation in flight: iterate for events; `statistics` is valid at any time.

    Takes part in every step of its engine until it ends or is closed: streams that are iterated in turns share passes
    through the model. Where all slots are taken it waits. Several threads may iterate streams of one engine.
    """

    def __init__(self, engine: Engine, tokens: list[int], request: Request) -> None:
        self._scheduler, self._background = engine.scheduler, engine.background
        self._events: deque[Event | Exception] = deque()
        self._ended = False  # nothing is delivered any more
        self.sequence = engine.submit(tokens, request, self._events.append, owner=self)

    @property
    def statistics(self) -> Statistics:
        return self.sequence.statistics

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters, seed included."""
        return self.sequence.params

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while not self._events and not self._ended:
            self._ended = self._background.call(self._advance)
        event = self._take()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events and not self._ended:
            self._ended = await self._background.wait(self._advance)
        event = self._take()
        if event is None:
            raise StopAsyncIteration
        return event

    def _advance(self, seconds: float = 0.0) -> bool:
        """Run one step, or as many as fit that time. Returns whether nothing more will be delivered."""
        until = time.perf_counter() + seconds
        if self._events and not seconds:  # another thread's step brought some
            return False
        while not self.sequence.finish:
            self._scheduler.tick()
            if time.perf_counter() >= until:
                return False
        self._scheduler.sweep()
        return True

    def _take(self) -> Event | None:
        """The next event, None after the last."""
        if not self._events:
            return None
        event = self._events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def generation(self) -> Generation:
        """Generate to the end; the events that were not taken yet, as one."""
        while not self._ended:
            self._ended = self._background.call(lambda: self._advance(BURST_SECONDS))
        events = list(self)
        assert self.sequence.finish is not None
        return Generation(
            "".join(event.text for event in events),
            tuple(self.sequence.generated),
            self.sequence.finish,
            self.statistics,
            self.sampling,
            tuple(delta.logprobs for event in events for delta in event.deltas if delta.logprobs),
        )

    async def wait(self) -> Generation:
        """`generation` for coroutines."""
        while not self._ended:
            self._ended = await self._background.wait(lambda: self._advance(BURST_SECONDS))
        return self.generation()

    def cancel(self) -> None:
        """Stop generating before the next step, without waiting for that."""
        self._end()
        self._background.post(self._scheduler.sweep)

    def close(self) -> None:
        """Stop generating and free the slot. May be called again."""
        if not self._ended or self._events:
            self._end()
            self._background.call(self._scheduler.sweep)

    def _end(self) -> None:
        self._scheduler.cancel(self.sequence)
        self._ended = True
        self._events.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

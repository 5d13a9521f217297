"""The engine for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from paceline.engine.engine import Engine, Prompt
from paceline.types import Event, Generation


class AsyncEngine:
    """An engine whose generations do not hold up the event loop.

    Any number of tasks may generate at once; cancelling a task ends its generation before the next step.

    >>> engine = paceline.AsyncEngine(paceline.load("tiny-python"))
    >>> async for event in engine.stream("def fibonacci(n):", raw=True):
    ...     print(event.text, end="")

    Args:
        engine: a loaded pair. It may be used directly, and by threads, at the same time.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def stream(self, prompt: Prompt, **settings: Any) -> AsyncIterator[Event]:
        """Generate; see `Engine.stream` for the arguments and errors, which come with the first event."""
        stream = await asyncio.to_thread(self.engine.stream, prompt, **settings)
        try:
            async for event in stream:
                yield event
        finally:
            stream.cancel()

    async def generate(self, prompt: Prompt, **settings: Any) -> Generation:
        """Generate to the end; see `Engine.stream` for the arguments and errors."""
        stream = await asyncio.to_thread(self.engine.stream, prompt, **settings)
        try:
            return await stream.wait()
        finally:
            stream.cancel()

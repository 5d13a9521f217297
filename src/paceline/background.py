"""A thread of its own for work that must not be interrupted, run twice at once, or survive the process unnoticed.

Python raises KeyboardInterrupt in the main thread, between any two instructions. What must not be left half done
therefore runs on another thread; the caller only waits, and an interrupt ends nothing but the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from paceline.errors import BackendError

T = TypeVar("T")
Reply = Callable[[Any, BaseException | None], None]
Calls = SimpleQueue[tuple[Callable[[], Any], Reply] | None]

CHECK_SECONDS = 5.0  # how often a caller looks whether the thread is alive


class Background:
    """Runs functions one after another on one thread.

    The thread ends with the object, and before the interpreter does. A process that was forked after the object was
    made has no such thread, and is told so.

    Args:
        name: of the thread.
        stack: its bytes; 0 for as many as usual.
    """

    def __init__(self, name: str, stack: int = 0) -> None:
        self._calls: Calls = SimpleQueue()
        self._process = os.getpid()
        self._thread = threading.Thread(target=_work, args=(self._calls,), name=name, daemon=True)
        usual = threading.stack_size(stack) if stack else 0  # of the process: a thread that starts now gets more, too
        try:
            self._thread.start()
        finally:
            if stack:
                threading.stack_size(usual)
        weakref.finalize(self, _stop, self._calls, self._thread, self._process)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function and return its result, or raise what it raises.

        Raises:
            BackendError: this process was forked from the one that has the thread, or the interpreter is exiting.
        """
        replies: SimpleQueue[tuple[T, BaseException | None]] = SimpleQueue()
        self.post(function, lambda value, error: replies.put((value, error)))
        while True:
            try:
                value, error = replies.get(timeout=CHECK_SECONDS)
            except Empty:
                if self._thread.is_alive():
                    continue
                raise BackendError("the interpreter is exiting; finish generations before") from None
            if error:
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame
            return value

    async def wait(self, function: Callable[[], T]) -> T:
        """`call` for coroutines: does not hold up the event loop.

        Raises:
            BackendError: see `call`.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(value: T, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error:
                future.set_exception(error)
            else:
                future.set_result(value)

        def reply(value: T, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed in the meantime
                loop.call_soon_threadsafe(settle, value, error)

        self.post(function, reply)
        return await future

    def post(self, function: Callable[[], Any], reply: Reply = lambda value, error: None) -> None:
        """Run a function without waiting for it.

        Args:
            function: what to run.
            reply: called with its result or its exception, on the thread; it must not raise.

        Raises:
            BackendError: see `call`.
        """
        if os.getpid() != self._process:
            raise BackendError(
                "this engine belongs to the process that loaded it, and this one was forked from that; "
                "load the engine after the fork, or start processes with the spawn method"
            )
        self._calls.put((function, reply))


def _work(calls: Calls) -> None:
    while (call := calls.get()) is not None:
        function, reply = call
        try:
            value, failure = function(), None
        except BaseException as error:
            value, failure = None, error
        reply(value, failure)
        del call, function, reply, value, failure  # nothing may live on until the next call


def _stop(calls: Calls, thread: threading.Thread, process: int) -> None:
    if os.getpid() == process:
        calls.put(None)
        if thread is not threading.current_thread():
            thread.join()

"""One engine in a process of its own, which measures it on request and sleeps meanwhile.

    python worker.py MODULE PATH FORMAT THREADS ROOM

Requests are JSON lines on stdin, answers JSON lines on stdout; the first line says what was loaded. Knows no engine:
those are `engine_*.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """What every engine can do. Logits are there when a call returns."""

    version: str

    def read(self, tokens: list[int]) -> None:
        """Forget everything, then read a prompt of which only the last row's logits are wanted."""

    def extend(self, tokens: list[int]) -> None:
        """Run these rows behind what is cached, all logits wanted."""

    def rewind(self) -> None:
        """Go back to what the last `read` left in the cache."""

    def best(self) -> int:
        """The most likely token behind the last row of the last call."""

    def logits(self) -> NDArray[np.float32]:
        """Logits of the wanted rows of the last call [rows, vocabulary]."""


def prompt(engine: Engine, tokens: list[int]) -> float:
    """Milliseconds until the logits of a prompt's last row; the prompt stays in the cache."""
    engine.read(tokens[:1])  # wakes threads, and maps memory that the system may have taken while others worked
    return _milliseconds(lambda: engine.read(tokens))


def forward(engine: Engine, batches: list[list[int]]) -> list[float]:
    """Milliseconds of each batch of rows behind the prompt."""
    engine.extend(batches[0])  # as above
    engine.rewind()
    times = []
    for tokens in batches:
        times.append(_milliseconds(partial(engine.extend, tokens)))
        engine.rewind()
    return times


def decode(engine: Engine, first: int, count: int) -> float:
    """Tokens a second of a plain greedy loop behind the prompt."""
    token = first
    engine.extend([first])  # as above
    engine.rewind()

    def loop() -> None:
        nonlocal token
        for _ in range(count):
            engine.extend([token])
            token = engine.best()

    elapsed = _milliseconds(loop)
    engine.rewind()
    return count / elapsed * 1e3


def logits(engine: Engine, tokens: list[int], path: str) -> None:
    """Save the logits of every row of a prompt but the first, as a NumPy file [rows - 1, vocabulary]."""
    engine.read(tokens[:1])
    engine.extend(tokens[1:])
    np.save(path, engine.logits())


MEASUREMENTS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (prompt, forward, decode, logits)}


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def main(module_name: str, path: str, fmt: str, threads: str, room: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    module = importlib.import_module(module_name)
    engine: Engine = module.open_engine(path, fmt, int(threads), int(room))
    print(json.dumps({"version": engine.version}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        measurement = MEASUREMENTS[request.pop("do")]
        print(json.dumps(measurement(engine, **request)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

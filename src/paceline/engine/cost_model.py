"""What rounds cost on this machine: measured once for a pair and its settings, kept in a file between starts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paceline.backends.base import Backend
from paceline.decode.draft_length import MAX_DEPTH, Costs
from paceline.engine.proposers import Proposer
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.errors import PacelineError
from paceline.files import atomic_file, read_json
from paceline.text.detokenizer import Detokenizer
from paceline.types import Draft, SamplingParams

CONTEXT = 64  # tokens before the rounds that are measured
LEAST_REPEATS, MOST_REPEATS = 2, 9
ENOUGH_SECONDS = 2.0
SLOW_SECONDS = 1.0  # say something before a wait of this length
SLOW_ROUND_MS = 10.0
SHARED = (1, 2, 4, 8, 16)  # sequences at once
MAX_COUNT = 64


@dataclass
class SimulatedProposer(Proposer):
    """Rounds of the backend's drafter whose outcome is SIMULATED: for measurements.

    Args:
        length: tokens drafted a round.
        accepted: of them, whatever the target samples.
    """

    length: int = 0
    accepted: int = 0

    def propose(self, sequence: Sequence, most: int) -> Draft:
        return Draft(length=self.length, simulated=self.accepted)


def load_costs(
    backend: Backend, params: SamplingParams, about: str, folder: Path, notify: Callable[[str], None]
) -> Costs:
    """Costs of rounds from the file that keeps them, or measured now and kept.

    Args:
        backend: a pair with a drafter, all slots free.
        params: sampling parameters of requests that give none.
        about: everything the costs depend on beside this machine: weights' formats, settings, threads.
        folder: where files of costs are kept.
        notify: told when measuring takes a while.
    """
    machine = [platform.machine(), _processor(), os.cpu_count()]
    key = hashlib.sha256(json.dumps([machine, about, repr(params), MAX_DEPTH]).encode()).hexdigest()[:16]
    path = folder / f"costs-{key}.json"
    kept = _read_costs(path)
    if kept:
        return kept
    costs = measure_costs(backend, params, notify)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start's time only
        folder.mkdir(parents=True, exist_ok=True)
        rounds_ms = {1: costs.rounds, **dict(costs.shared)}
        with atomic_file(path) as file:
            file.write(json.dumps({"about": about, "rounds_ms": rounds_ms, "token_ms": costs.token}).encode())
    return costs


def _read_costs(path: Path) -> Costs | None:
    """The costs in a file; None if it is missing, or damaged in any way."""
    with contextlib.suppress(PacelineError):
        content = read_json(path)
        tables, token = content.get("rounds_ms"), content.get("token_ms")
        if not isinstance(tables, dict) or not _are_times([token], 0):
            return None
        counts = {str(count): count for count in range(1, MAX_COUNT + 1)}
        rounds = {counts[key]: tuple(ms) for key, ms in tables.items() if key in counts and _are_times(ms, 1e-6)}
        lengths = {len(ms) for ms in rounds.values()}
        if len(rounds) == len(tables) and 1 in rounds and len(lengths) == 1 and 2 <= lengths.pop() <= MAX_DEPTH + 1:
            return Costs(rounds.pop(1), float(token or 0), tuple(sorted(rounds.items())))
    return None


def _are_times(values: object, least: float) -> bool:
    """Whether these are milliseconds that a round can take."""
    numbers = isinstance(values, list) and all(type(one) in (int, float) for one in values)
    return numbers and all(least <= one <= 1e7 for one in values)  # type: ignore[attr-defined]


def measure_costs(backend: Backend, params: SamplingParams, notify: Callable[[str], None] = lambda _: None) -> Costs:
    """Milliseconds of whole rounds of depth 0, 1, ..., of one sequence and of several at once.

    The least of several measurements: other work on the machine only ever adds to them.
    """
    counts = [count for count in SHARED if count < backend.info.slots] + [backend.info.slots]
    tables = {}
    token = 0.0
    for count in counts:
        rounds, accepting = _Rounds(backend, params, count).measure(notify)
        tables[count] = rounds
        if count == 1:
            token = max(0.0, accepting - rounds[-1]) / (len(rounds) - 1)
    return Costs(tables.pop(1), token, tuple(tables.items()))


class _Rounds:
    """Sequences that repeat one round over a short context."""

    def __init__(self, backend: Backend, params: SamplingParams, count: int) -> None:
        info = backend.info
        self._backend = backend
        self._context = max(1, min(CONTEXT, info.context // 4))
        self._deepest = max(1, min(MAX_DEPTH, info.max_rows - 1, info.context // 4))
        self._proposer = SimulatedProposer()
        random = np.random.default_rng(0)
        self._sequences = [
            Sequence(
                tokens=random.integers(0, info.vocab_size, self._context).tolist(),
                params=replace(params, seed=0),
                draft_tokens=None,
                max_tokens=1 << 30,
                limit=1 << 30,
                stop_ids=frozenset(),
                detokenizer=Detokenizer(None, lambda _: None),  # no text
            )
            for _ in range(count)
        ]

    def measure(self, notify: Callable[[str], None]) -> tuple[tuple[float, ...], float]:
        """Least milliseconds by draft length, and of a round of the longest whose draft is accepted whole."""
        for sequence in self._sequences:
            sequence.slot = self._backend.open_slot()
        try:
            for sequence in self._sequences:
                while sequence.in_prefill:
                    step(self._backend, (), [sequence], self._backend.info.max_rows)
            return self._measure(notify)
        finally:
            for sequence in self._sequences:
                self._backend.close_slot(sequence.slot)

    def _measure(self, notify: Callable[[str], None]) -> tuple[tuple[float, ...], float]:
        times: list[list[float]] = [[] for _ in range(self._deepest + 1)]
        accepting: list[float] = []
        slow = max(self._round(depth) for depth in (0, self._deepest))
        row = 1 if slow > SLOW_ROUND_MS else 4
        started = time.perf_counter()
        for repeat in range(MOST_REPEATS):
            for depth, seen in enumerate(times):
                # Of quick rounds a few in a row, as they are when decoding: the first finds caches cold.
                seen += [self._round(depth) for _ in range(row)][row > 1 :]
            accepting += [self._round(self._deepest, self._deepest) for _ in range(row)][row > 1 :]
            spent = time.perf_counter() - started
            if repeat == 0 and spent * (LEAST_REPEATS - 1) > SLOW_SECONDS:
                notify("measuring what drafting costs on this machine (once for this model and settings)")
            if repeat + 1 >= LEAST_REPEATS and spent > ENOUGH_SECONDS:
                break
        return tuple(min(seen) for seen in times), min(accepting)

    def _round(self, length: int, accepted: int = 0) -> float:
        """Milliseconds of one round with a draft of that length; the sequences are put back to where they were."""
        self._proposer.length, self._proposer.accepted = length, accepted
        started = time.perf_counter()
        step(self._backend, (self._proposer,), self._sequences, self._backend.info.max_rows)
        seconds = time.perf_counter() - started
        for sequence in self._sequences:
            self._backend.truncate(sequence.slot, self._context)
            del sequence.tokens[self._context + 1 :]
            sequence.cached = self._context
        return seconds * 1e3


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor()

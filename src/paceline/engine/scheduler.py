"""Continuous batching: which sequences wait for a slot, which run, and what the next step runs of them.

A step advances every decoding sequence by one round, and at most one sequence in prefill by a chunk of its prompt, so a
long prompt stalls the others for no longer than a chunk takes. Sequences in prefill take turns. A prompt with a cached
prefix starts after it; one that shares a prefix with a prompt in prefill waits for that prefix.

One thread calls `tick`; others may `submit` and `cancel` meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from paceline.backends.base import Backend
from paceline.engine.prefix_cache import MIN_TOKENS, PrefixCache, common_length
from paceline.engine.proposers import Proposer
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.errors import BusyError
from paceline.types import Event

MIN_CHUNK = 16  # rows; up to here they cost about the same

Deliver = Callable[[Event], None]


@dataclass
class Scheduler:
    """Sequences in flight over one backend.

    Args:
        backend: the model pair; as many sequences run at once as it has slots.
        proposers: who drafts; see `engine.proposers`.
        chunk: most prompt tokens of a sequence in one step.
        max_waiting: sequences that may wait for a slot.
        prefix_cache: snapshots of prompts' KV cache; None to run all prompts whole.
        max_stall: seconds that a chunk of a prompt may delay the sequences that decode.
    """

    backend: Backend
    proposers: Items[Proposer]
    chunk: int
    max_waiting: int = 64
    prefix_cache: PrefixCache | None = None
    max_stall: float = 0.4
    running: list[Sequence] = field(default_factory=list)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _row_seconds: float = 1.0  # that a row of a prompt took recently; at first a cautious guess
    _leaders: dict[int, tuple[Sequence, int]] = field(default_factory=dict)  # whose prefix a sequence waits for
    _deliver: dict[int, Deliver] = field(default_factory=dict)  # by the sequence's identity

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Sequences that may still be submitted."""
        waiting = sum(not sequence.finish for sequence in list(self._waiting))
        running = sum(not sequence.finish for sequence in list(self.running))
        return self.backend.info.slots + self.max_waiting - running - waiting

    @property
    def busy(self) -> bool:
        """Whether there is anything to run."""
        return bool(self.running or self._waiting)

    def submit(self, sequence: Sequence, deliver: Deliver) -> None:
        """Let a sequence run as soon as a slot is free.

        Args:
            sequence: a new one, without a slot.
            deliver: called by `tick` with each of its events.

        Raises:
            BusyError: too many are waiting.
        """
        if self.room < 1:
            raise BusyError(f"{len(self._waiting)} requests are waiting already; try again later")
        for proposer in self.proposers:
            proposer.begin(sequence)
        self._deliver[id(sequence)] = deliver
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence before its next round, without an event."""
        sequence.finish = sequence.finish or "cancelled"

    def tick(self) -> None:
        """Run one step, if there is anything to do, and deliver its events."""
        self.sweep()
        self._admit()
        chosen = self._choose()
        if not chosen:
            return
        prefilling = chosen[-1] if chosen[-1].in_prefill else None
        chunk = self.chunk
        if prefilling and len(chosen) > 1:
            chunk = int(min(chunk, max(MIN_CHUNK, self.max_stall / self._row_seconds)))
        before, started = chosen[-1].cached, time.perf_counter()
        events = step(self.backend, self.proposers, chosen, chunk)
        if prefilling:
            rows = max(1, min(prefilling.cached, prefilling.prompt_length) - before)
            self._row_seconds = (time.perf_counter() - started) / rows
            if self.prefix_cache and (prefilling.cached in prefilling.branches or not prefilling.in_prefill):
                self.prefix_cache.store(prefilling.slot, prefilling.tokens[: prefilling.cached])
        for sequence, event in zip(chosen, events, strict=True):
            if event and id(sequence) in self._deliver:
                self._deliver[id(sequence)](event)
        self.sweep()

    def sweep(self) -> None:
        """Remove sequences that have ended, and free their slots."""
        for sequence in [s for s in list(self._waiting) if s.finish]:
            self._waiting.remove(sequence)
            self._forget(sequence)
        for sequence in [s for s in self.running if s.finish]:
            self.running.remove(sequence)
            self._forget(sequence)
            if self.prefix_cache and sequence.cached:
                length = min(sequence.cached, len(sequence.tokens))
                self.backend.truncate(sequence.slot, length)
                self.prefix_cache.store(sequence.slot, sequence.tokens[:length])
            self.backend.close_slot(sequence.slot)

    def abandon(self) -> None:
        """Drop everything after a step has failed."""
        for sequence in self.running:
            self.backend.close_slot(sequence.slot)
        for sequence in [*self.running, *self._waiting]:
            sequence.finish = sequence.finish or "cancelled"
            self._forget(sequence)
        self.running.clear()
        self._waiting.clear()

    def _forget(self, sequence: Sequence) -> None:
        self._deliver.pop(id(sequence), None)
        self._leaders.pop(id(sequence), None)
        for proposer in self.proposers:
            proposer.finish(sequence)

    def _admit(self) -> None:
        while self._waiting and len(self.running) < self.backend.info.slots:
            sequence = self._waiting.popleft()
            sequence.admit(self.backend.open_slot())
            self._follow(sequence)
            self.running.append(sequence)

    def _follow(self, sequence: Sequence) -> None:
        """Let a sequence wait for another in prefill that shares a prefix with it, if none in the cache is as long."""
        prefilling = [other for other in self.running if other.in_prefill]
        if not self.prefix_cache or not prefilling:
            return
        length = self.prefix_cache.find(sequence.tokens).length
        mine = np.array(sequence.tokens, np.int32)
        for other in prefilling:
            common = common_length(mine, np.array(other.tokens, np.int32))
            if common >= length + MIN_TOKENS and other.cached <= common:
                self._leaders[id(sequence)] = other, common
                length = common
        if id(sequence) in self._leaders:
            leader, common = self._leaders[id(sequence)]
            leader.branches.add(common)

    def _may_prefill(self, sequence: Sequence) -> bool:
        if id(sequence) not in self._leaders:
            return True
        leader, common = self._leaders[id(sequence)]
        if leader.in_prefill and not leader.finish and leader.cached < common:
            return False
        del self._leaders[id(sequence)]
        return True

    def _restore(self, sequence: Sequence) -> None:
        """Take over the cached prefix of a prompt, and note where the prompt branches off from others."""
        if self.prefix_cache and not sequence.cached:
            match = self.prefix_cache.find(sequence.tokens)
            self.prefix_cache.restore(sequence.slot, match)
            sequence.resume(match.length)
            if match.branch:
                sequence.branches.add(match.branch)

    def _choose(self) -> list[Sequence]:
        """The sequences of the next step: all that decode, then one in prefill."""
        prefilling = next((s for s in self.running if s.in_prefill and self._may_prefill(s)), None)
        if prefilling:  # to the end of the list, so that the next tick takes another
            self.running.remove(prefilling)
            self.running.append(prefilling)
            self._restore(prefilling)
        return [s for s in self.running if not s.in_prefill] + ([prefilling] if prefilling else [])

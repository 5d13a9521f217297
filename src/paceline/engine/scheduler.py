"""Continuous batching: which sequences wait for a slot, which run, and what the next step runs of them.

A step advances every decoding sequence by one round, and at most one sequence in prefill by a chunk of its prompt, so a
long prompt stalls the others for no longer than a chunk takes. Sequences in prefill take turns. A prompt with a cached
prefix starts after it; one that shares a prefix with a prompt in prefill waits for that prefix.

The queue is fair: clients take turns, and each sequence counts, so a request for many choices waits for itself and not
in front of others. In a full queue the client with the most waiting sequences gives up its last one for another's.

One thread calls `tick`; others may `submit` and `cancel` meanwhile. Both only append or mark, so an interrupt between
any two instructions of theirs leaves nothing half done.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from paceline.backends.base import Backend
from paceline.engine.prefix_cache import MIN_TOKENS, PrefixCache, common_length
from paceline.engine.proposers import Proposer
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.errors import BusyError

MIN_CHUNK = 16  # rows; up to here they cost about the same


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
    _turn: float = 0.0  # of the sequence that was admitted last
    _last_turns: dict[str, float] = field(default_factory=dict)  # of each client's last sequence in the queue

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

    def submit(self, sequence: Sequence) -> None:
        """Let a sequence run as soon as a slot is free and it is its client's turn.

        Raises:
            BusyError: too many are waiting.
        """
        if self.room < 1:
            self._make_room(sequence.client)
        sequence.turn = max(self._turn, self._last_turns.get(sequence.client, 0.0)) + 1
        self._last_turns[sequence.client] = sequence.turn
        self._waiting.append(sequence)

    def _make_room(self, client: str) -> None:
        """Turn away the last waiting sequence of the client that has the most, if that is more than this one has."""
        waiting = [sequence for sequence in list(self._waiting) if not sequence.finish]
        counts = Counter(sequence.client for sequence in waiting)
        busiest = max(counts, key=lambda one: counts[one], default=client)
        error = BusyError(f"the queue is full ({len(waiting)} requests are waiting); try again later")
        if counts[busiest] <= counts[client] + 1:
            raise error
        victim = max((s for s in waiting if s.client == busiest), key=lambda s: s.turn)
        victim.failure = error
        self.cancel(victim)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence before its next round, without an event."""
        sequence.finish = sequence.finish or "cancelled"

    def tick(self) -> None:
        """Run one step, if there is anything to do, and deliver its events.

        If it fails, every sequence in flight ends with the exception.
        """
        try:
            self._tick()
        except Exception as error:
            self._abandon(error)

    def _tick(self) -> None:
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
            if event:
                sequence.deliver(event)
        self.sweep()

    def sweep(self) -> None:
        """Remove sequences that have ended or whose owner has gone, and free their slots."""
        for sequence in [*self._waiting, *self.running]:
            if sequence.owner and sequence.owner() is None:
                self.cancel(sequence)
        for sequence in [s for s in list(self._waiting) if s.finish]:
            self._waiting.remove(sequence)
            self._forget(sequence)
        for sequence in [s for s in self.running if s.finish]:
            self.running.remove(sequence)
            try:
                self._forget(sequence)
                if self.prefix_cache and sequence.cached:
                    length = min(sequence.cached, len(sequence.tokens))
                    self.backend.truncate(sequence.slot, length)
                    self.prefix_cache.store(sequence.slot, sequence.tokens[:length])
            finally:
                self.backend.close_slot(sequence.slot)

    def _abandon(self, error: Exception) -> None:
        """Drop everything after a step has failed."""
        for sequence in self.running:
            self.backend.close_slot(sequence.slot)
        for sequence in [*self.running, *self._waiting]:
            self.cancel(sequence)
            self._forget(sequence)
            sequence.deliver(error)
        self.running.clear()
        self._waiting.clear()

    def _forget(self, sequence: Sequence) -> None:
        self._leaders.pop(id(sequence), None)
        for proposer in self.proposers:
            proposer.finish(sequence)
        if sequence.failure:
            sequence.deliver(sequence.failure)

    def _admit(self) -> None:
        while self._waiting and len(self.running) < self.backend.info.slots:
            sequence = min(list(self._waiting), key=lambda one: one.turn)
            for proposer in self.proposers:
                proposer.begin(sequence)
            self._follow(sequence)
            slot = self.backend.open_slot()
            self._waiting.remove(sequence)
            self._turn = sequence.turn
            self._last_turns = {client: turn for client, turn in self._last_turns.items() if turn > self._turn}
            sequence.admit(slot)
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

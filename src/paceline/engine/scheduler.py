"""Everything in flight: which sequences wait for a slot, which run, and what the next step reads.

A step advances every sequence that is writing by one round, and at most one that is still reading by a chunk of its
prompt, so a long prompt holds nobody up for longer than a chunk takes. Sequences that read take turns.
A prompt whose beginning was read before takes those rows over; one whose beginning is just being read waits for it.

One thread calls `tick`; others may `submit` and `cancel` meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from paceline.backends.base import Backend
from paceline.decode.draft_length import REPLAN, SHARED_REPLAN, Costs, Drift, observe_shared, share_out
from paceline.engine.prefix import LEAST_TOKENS, PrefixCache, common_length
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.errors import BusyError
from paceline.types import Event, Plan

LEAST_CHUNK = 16  # rows cost about the same up to here

Deliver = Callable[[Event], None]


@dataclass
class Scheduler:
    """Sequences in flight over one backend.

    Args:
        backend: the model pair; as many sequences run at once as it has slots.
        chunk: most prompt tokens read in one step.
        most_waiting: sequences that may wait for a slot.
        prefixes: beginnings of prompts that need not be read again; None to read all.
        most_pause: seconds that a chunk of a prompt may hold up those who write.
    """

    backend: Backend
    chunk: int
    most_waiting: int = 64
    prefixes: PrefixCache | None = None
    most_pause: float = 0.4
    running: list[Sequence] = field(default_factory=list)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _planned: list[Sequence] = field(default_factory=list)  # whom drafts were shared out among
    _drift: Drift = field(default_factory=Drift)
    _rounds_left: int = 0  # until they are shared out anew
    _row_seconds: float = 1.0  # that a row of a prompt took lately; at first a guess on the safe side
    _leaders: dict[int, tuple[Sequence, int]] = field(default_factory=dict)  # whom a sequence waits for, and its length
    _deliver: dict[int, Deliver] = field(default_factory=dict)  # by the sequence's identity

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Sequences that may still be submitted."""
        waiting = sum(not sequence.finish for sequence in list(self._waiting))
        running = sum(not sequence.finish for sequence in list(self.running))
        return self.backend.slots + self.most_waiting - running - waiting

    @property
    def busy(self) -> bool:
        """Whether a tick has something to do."""
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
        self._deliver[id(sequence)] = deliver
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out before its next round; no event tells of it."""
        sequence.finish = sequence.finish or "cancelled"

    def tick(self) -> None:
        """Do one step, if there is anything to do, and deliver its events."""
        self.sweep()
        self._admit()
        chosen = self._choose()
        if not chosen:
            return
        reader = chosen[-1] if chosen[-1].reading else None
        self._plan(chosen[:-1] if reader else chosen)
        events = self._step_reading(chosen, reader) if reader else self._step_writing(chosen)
        if reader and self.prefixes and (reader.cached in reader.branches or not reader.reading):
            self.prefixes.keep(reader.slot, reader.tokens[: reader.cached])
        for sequence, event in zip(chosen, events, strict=True):
            if event and id(sequence) in self._deliver:
                self._deliver[id(sequence)](event)
        self.sweep()

    def _step_writing(self, chosen: list[Sequence]) -> list[Event | None]:
        """Run a step in which all write, and learn what it takes."""
        started = time.perf_counter()
        events = step(self.backend, chosen, self.chunk)
        milliseconds = (time.perf_counter() - started) * 1e3
        drafted = [event.drafted for event in events if event]
        costs = chosen[0].costs
        telling = len(chosen) > 1 and (any(drafted) or self._rounds_left % REPLAN == 0)  # plain ones are all alike
        if telling and costs and costs.shared and all(s.draft_tokens is None and not s.grammar for s in chosen):
            accepted = sum(event.accepted for event in events if event)
            self._drift = observe_shared(self._drift, costs, drafted, accepted, milliseconds)
        return events

    def _step_reading(self, chosen: list[Sequence], reader: Sequence) -> list[Event | None]:
        """Run a step in which a chunk of a prompt is read, which takes no longer than others are to wait."""
        chunk = self.chunk
        if len(chosen) > 1:
            chunk = int(min(chunk, max(LEAST_CHUNK, self.most_pause / self._row_seconds)))
        before, started = reader.cached, time.perf_counter()
        events = step(self.backend, chosen, chunk)
        self._row_seconds = (time.perf_counter() - started) / max(1, min(reader.cached, reader.prompt_length) - before)
        return events

    def sweep(self) -> None:
        """Let go of sequences that have ended, and give back their slots."""
        for sequence in [s for s in list(self._waiting) if s.finish]:
            self._waiting.remove(sequence)
            self._deliver.pop(id(sequence), None)
        for sequence in [s for s in self.running if s.finish]:
            self.running.remove(sequence)
            self._deliver.pop(id(sequence), None)
            self._leaders.pop(id(sequence), None)
            if self.prefixes and sequence.cached:
                length = min(sequence.cached, len(sequence.tokens))
                self.backend.truncate(sequence.slot, length)
                self.prefixes.keep(sequence.slot, sequence.tokens[:length])
            self.backend.close_slot(sequence.slot)

    def abandon(self) -> None:
        """Let go of everything after a step has failed."""
        for sequence in [*self.running, *self._waiting]:
            sequence.finish = sequence.finish or "cancelled"
        for sequence in self.running:
            self.backend.close_slot(sequence.slot)
        for held in (self.running, self._waiting, self._deliver, self._leaders):
            held.clear()

    def _admit(self) -> None:
        while self._waiting and len(self.running) < self.backend.slots:
            sequence = self._waiting.popleft()
            sequence.admit(self.backend.open_slot())
            self._follow(sequence)
            self.running.append(sequence)

    def _follow(self, sequence: Sequence) -> None:
        """Let a sequence wait for another that is reading the same beginning, if nothing kept is as long."""
        readers = [other for other in self.running if other.reading]
        if not self.prefixes or not readers:
            return
        length = self.prefixes.find(sequence.tokens).length
        mine = np.array(sequence.tokens, np.int32)
        for other in readers:
            common = common_length(mine, np.array(other.tokens, np.int32))
            if common >= length + LEAST_TOKENS and other.cached <= common:
                self._leaders[id(sequence)] = other, common
                length = common
        if id(sequence) in self._leaders:
            leader, common = self._leaders[id(sequence)]
            leader.branches.add(common)

    def _may_read(self, sequence: Sequence) -> bool:
        if id(sequence) not in self._leaders:
            return True
        leader, common = self._leaders[id(sequence)]
        if leader.reading and not leader.finish and leader.cached < common:
            return False
        del self._leaders[id(sequence)]
        return True

    def _begin(self, sequence: Sequence) -> None:
        """Take over what was read before of a prompt, and note where it branches off."""
        if self.prefixes and not sequence.cached:
            match = self.prefixes.find(sequence.tokens)
            self.prefixes.restore(sequence.slot, match)
            sequence.resume(match.length)
            if match.branch:
                sequence.branches.add(match.branch)

    def _plan(self, writing: list[Sequence]) -> None:
        """Share out drafts among sequences that write together; one alone plans for itself."""
        self._rounds_left -= 1
        if self._rounds_left > 0 and writing == self._planned:
            return
        auto = [s for s in writing if s.draft_tokens is None and s.costs and s.costs.shared]
        plans: list[Plan | None] = [None] * len(auto)
        if len(auto) > 1:
            plans = [*share_out([s.control for s in auto], auto[0].costs or Costs(()), self._drift)]
        drafting = any(plan and plan.depth for plan in plans)
        self._planned, self._rounds_left = writing, REPLAN if drafting else SHARED_REPLAN
        for sequence, plan in zip(auto, plans, strict=True):
            quiet = sequence.control.plain_rounds + self._rounds_left * (plan is not None and not plan.depth)
            sequence.control = replace(sequence.control, plan=plan, plain_rounds=quiet)

    def _choose(self) -> list[Sequence]:
        reader = next((s for s in self.running if s.reading and self._may_read(s)), None)
        if reader:  # to the back of the line, so that the next tick takes another
            self.running.remove(reader)
            self.running.append(reader)
            self._begin(reader)
        return [s for s in self.running if not s.reading] + ([reader] if reader else [])

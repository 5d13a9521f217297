"""Everything in flight: which sequences wait for a slot, which run, and what the next step reads.

A step advances every sequence that is writing by one round, and at most one that is still reading by a chunk of its
prompt, so a long prompt holds nobody up for longer than a chunk takes. Sequences that read take turns.

One thread calls `tick`; others may `submit` and `cancel` meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from paceline.backends.base import Backend
from paceline.decode.control import REPLAN, Costs, share_out
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.errors import BusyError
from paceline.types import Event, Plan

Deliver = Callable[[Event], None]


@dataclass
class Scheduler:
    """Sequences in flight over one backend.

    Args:
        backend: the model pair; as many sequences run at once as it has slots.
        chunk: most prompt tokens read in one step.
        most_waiting: sequences that may wait for a slot.
    """

    backend: Backend
    chunk: int
    most_waiting: int = 64
    running: list[Sequence] = field(default_factory=list)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _planned: tuple[int, ...] = ()  # identities of the sequences that drafts were shared out among
    _ticks: int = 0  # since then
    _deliver: dict[int, Deliver] = field(default_factory=dict)  # by the sequence's identity

    @property
    def waiting(self) -> int:
        return len(self._waiting)

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
        if len(self._waiting) >= self.most_waiting:
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
        self._plan([s for s in chosen if not s.reading])
        for sequence, event in zip(chosen, step(self.backend, chosen, self.chunk), strict=True):
            if event and id(sequence) in self._deliver:
                self._deliver[id(sequence)](event)
        self.sweep()

    def sweep(self) -> None:
        """Give back the slots of sequences that have ended."""
        for sequence in [s for s in self.running if s.finish]:
            self.running.remove(sequence)
            self._deliver.pop(id(sequence), None)
            self.backend.close_slot(sequence.slot)

    def _admit(self) -> None:
        while self._waiting and len(self.running) < self.backend.slots:
            sequence = self._waiting.popleft()
            if sequence.finish:  # cancelled while it waited
                self._deliver.pop(id(sequence), None)
                continue
            sequence.slot = self.backend.open_slot()
            self.running.append(sequence)

    def _plan(self, writing: list[Sequence]) -> None:
        """Share out drafts among sequences that write together; one alone plans for itself."""
        auto = [s for s in writing if s.draft_tokens is None and s.costs and s.costs.shared]
        members = tuple(id(s) for s in auto)
        if members == self._planned and self._ticks % REPLAN:
            self._ticks += 1
            return
        self._planned, self._ticks = members, 1
        plans: list[Plan | None] = [None] * len(auto)
        if len(auto) > 1:
            plans = [*share_out([s.control for s in auto], auto[0].costs or Costs(()))]
        for sequence, plan in zip(auto, plans, strict=True):
            quiet = sequence.control.plain_rounds + REPLAN * (plan is not None and not plan.depth)
            sequence.control = replace(sequence.control, plan=plan, plain_rounds=quiet)

    def _choose(self) -> list[Sequence]:
        reading = [s for s in self.running if s.reading]
        if reading:  # to the back of the line, so that the next tick takes another
            self.running.remove(reading[0])
            self.running.append(reading[0])
        return [s for s in self.running if not s.reading] + reading[:1]

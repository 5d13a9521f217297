"""Simulated acceptance: rounds run for real, and only the outcome of each verification is scripted.

Random weights accept nothing, so the speed of a pair with a given acceptance is measured by deciding beforehand how
many drafts each round accepts. Drafting, the target's pass, rollback and the engine around them are the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.backends.base import Backend
from paceline.types import Anchors, Batch, Drafts, Float32, Output

GOLDEN = 0.6180339887498949


@dataclass
class Script:
    """Decides which drafts are accepted, and draws tokens accordingly: a `Sampling` and a `Backend` around another.

    `shares[i]` is the share of rounds in which the draft at depth i + 1 is accepted; it never rises. Rounds take their
    outcomes from a low-discrepancy sequence, so the shares hold closely over few rounds.
    """

    backend: Backend
    shares: tuple[float, ...]
    drafted: dict[int, int] = field(default_factory=dict)  # position -> token of the round in flight
    _round: int = 0

    def draw(self, logits: Float32, position: int) -> int:
        token = int(logits.argmax())  # the real cost of drawing
        if position not in self.drafted:
            return token
        start = min(self.drafted)
        accepted = sum((self._round * GOLDEN) % 1.0 < share for share in self.shares)
        if position - start < accepted:
            return self.drafted[position]
        return (self.drafted[position] + 1) % self.vocab_size

    def draft(self, anchors: Anchors, depth: int) -> Drafts:
        drafts = self.backend.draft(anchors, depth)
        first = int(anchors.positions[0]) + 1
        self.drafted = dict(enumerate(drafts.tokens[0].tolist(), start=first))
        self._round += 1
        return drafts

    @property
    def vocab_size(self) -> int:
        return self.backend.vocab_size

    @property
    def context(self) -> int:
        return self.backend.context

    @property
    def max_rows(self) -> int:
        return self.backend.max_rows

    @property
    def can_draft(self) -> bool:
        return self.backend.can_draft

    def open_slot(self) -> int:
        return self.backend.open_slot()

    def close_slot(self, slot: int) -> None:
        self.backend.close_slot(slot)

    def forward(self, batch: Batch) -> Output:
        return self.backend.forward(batch)

    def truncate(self, slot: int, length: int) -> None:
        self.backend.truncate(slot, length)

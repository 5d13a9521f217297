"""Simulated acceptance: rounds run for real, and only the outcome of each verification is scripted.

Random weights accept nothing, so the speed of a pair with a given acceptance is measured by deciding beforehand how
many drafts each round accepts. Drafting, the target's pass, rollback and the engine around them are the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paceline.backends.base import Backend
from paceline.decode.sampling_params import History
from paceline.types import Anchors, Batch, Drafts, Line, Output, Row, SamplingParams

GOLDEN = 0.6180339887498949


@dataclass
class Script:
    """Decides which drafts are accepted, and draws tokens accordingly: a `Rule` and a `Backend` around another.

    `shares[i]` is the share of rounds in which the draft at depth i + 1 is accepted; it never rises. Rounds take their
    outcomes from a low-discrepancy sequence, so the shares hold closely over few rounds.
    """

    backend: Backend
    shares: tuple[float, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: int = 0
    with_logits: bool = False
    _round: int = 0

    def settle(self, logits: Row, position: int, history: History, line: Line, depth: int) -> int:
        token = self.backend.draw(logits, self.sampling, position)  # the real cost of drawing
        if depth == len(line.tokens):
            return token
        accepted = sum((self._round * GOLDEN) % 1.0 < share for share in self.shares)
        return line.tokens[depth] if depth < accepted else (line.tokens[depth] + 1) % self.vocab_size

    def draw(self, logits: Row, sampling: SamplingParams, position: int) -> int:
        return self.backend.draw(logits, sampling, position)

    def allowed(self, logits: Row, sampling: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return self.backend.allowed(logits, sampling)

    def draft(self, anchors: Anchors) -> Drafts:
        self._round += 1
        return self.backend.draft(anchors)

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
    def slots(self) -> int:
        return self.backend.slots

    @property
    def can_draft(self) -> bool:
        return self.backend.can_draft

    @property
    def stops_early(self) -> bool:
        return False  # random weights are sure of nothing

    def open_slot(self) -> int:
        return self.backend.open_slot()

    def close_slot(self, slot: int) -> None:
        self.backend.close_slot(slot)

    def forward(self, batch: Batch) -> Output:
        return self.backend.forward(batch)

    def truncate(self, slot: int, length: int) -> None:
        self.backend.truncate(slot, length)

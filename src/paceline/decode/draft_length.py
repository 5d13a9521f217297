"""How often drafted tokens are accepted, and how far a draft pays.

No clock, no model: observations in, chances and floors out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.types import CONFIDENCE_BINS, Result

MAX_DEPTH = 8  # tokens that the drafter is asked for
KEEP = 1 - 1 / 32  # decay of observations per drafted round: about the last 32 count
KEEP_PLAIN = 1 - 1 / 16  # per round without a draft
KEEP_LONG = 1 - 1 / 512  # of the long-term average
PRIOR = 0.7  # acceptance before anything was observed, with the weight of PRIOR_ROUNDS
PRIOR_ROUNDS = 3.0
LONG_ROUNDS = 8.0  # weight of what was seen long ago
FROM_BEFORE = 0.25  # of the counts, for the next text


def _zeros(count: int) -> list[float]:
    return [0.0] * count


@dataclass
class Acceptance:
    """What was observed of the drafter's tokens in one text. Counts fade as new rounds come."""

    tried: list[float] = field(default_factory=lambda: _zeros(MAX_DEPTH))  # at depth 1, 2, ...: all before accepted
    kept: list[float] = field(default_factory=lambda: _zeros(MAX_DEPTH))  # of these, accepted
    tried_long: float = 0.0  # first drafts over a longer time
    kept_long: float = 0.0
    sure_tried: list[float] = field(default_factory=lambda: _zeros(CONFIDENCE_BINS))  # by the drafter's confidence
    sure_kept: list[float] = field(default_factory=lambda: _zeros(CONFIDENCE_BINS))
    rested: int = 0  # rounds since the drafter's last one

    def chances(self) -> list[float]:
        """Estimated chance of a draft at depth 1, 2, ... given that those before it were accepted.

        A depth that was seldom seen is taken to be like the one before it: acceptance often rises with depth, and a
        falling one would keep deep drafts from ever being seen.
        """
        estimate = (self.kept_long + PRIOR_ROUNDS * PRIOR) / (self.tried_long + PRIOR_ROUNDS)
        estimates, weight = [], LONG_ROUNDS
        old = KEEP_PLAIN ** min(self.rested, 1000)  # what was seen grows old while nothing is drafted
        for tried, kept in zip(self.tried, self.kept, strict=True):
            estimate = (old * kept + weight * estimate) / (old * tried + weight)
            estimates.append(estimate)
            weight = PRIOR_ROUNDS
        return estimates

    def by_confidence(self) -> tuple[float, ...]:
        """Chance of a draft by the drafter's confidence, which is taken to be roughly calibrated at first."""
        return tuple(
            (kept + PRIOR_ROUNDS * (0.2 + 0.8 * (i + 0.5) / CONFIDENCE_BINS)) / (tried + PRIOR_ROUNDS)
            for i, (tried, kept) in enumerate(zip(self.sure_tried, self.sure_kept, strict=True))
        )

    def observe(self, result: Result) -> None:
        """A round of the drafter's."""
        old, self.rested = KEEP_PLAIN ** min(self.rested, 1000), 0
        if old != 1.0:
            self.tried, self.kept = [old * n for n in self.tried], [old * n for n in self.kept]
        accepted = result.accepted
        seen = min(accepted + 1, len(result.drafted))
        for i in range(seen):
            right = float(i < accepted)
            if i < MAX_DEPTH:
                self.tried[i] = KEEP * self.tried[i] + 1
                self.kept[i] = KEEP * self.kept[i] + right
            if result.confidence:
                bin = confidence_bin(result.confidence[i])
                self.sure_tried[bin] = KEEP * self.sure_tried[bin] + 1
                self.sure_kept[bin] = KEEP * self.sure_kept[bin] + right
        self.tried_long = KEEP_LONG * self.tried_long + 1
        self.kept_long = KEEP_LONG * self.kept_long + float(accepted > 0)

    def for_next_text(self) -> Acceptance:
        """What a text starts with that follows this one: other text, so little of the counts by depth."""
        old = FROM_BEFORE * KEEP_PLAIN ** min(self.rested, 1000)
        tried, kept = [old * n for n in self.tried], [old * n for n in self.kept]
        return Acceptance(tried, kept, self.tried_long, self.kept_long, [*self.sure_tried], [*self.sure_kept])


def confidence_bin(confidence: float) -> int:
    """Which of CONFIDENCE_BINS a confidence falls into; the lowest for what is none."""
    return min(CONFIDENCE_BINS - 1, int(confidence * CONFIDENCE_BINS)) if 0 <= confidence <= 1 else 0


def expected_gains(chances: Sequence[float]) -> list[float]:
    """Tokens that drafts of length 0, 1, ... are expected to add, by the chance of each given those before it."""
    gains, chance = [0.0], 1.0
    for p in chances:
        chance *= p
        gains.append(gains[-1] + chance)
    return gains


def stop_floors(prices: Sequence[float], chances: Sequence[float], worth: float) -> tuple[float, ...]:
    """For each depth, the chance of the draft so far below which another token is not worth its cost.

    Args:
        prices: milliseconds of rounds of depth 0, 1, ...
        chances: of a draft at depth 1, 2, ... given those before it.
        worth: of a millisecond, in tokens.

    Drafting on from depth j to m costs prices[m] - prices[j]; it gains the draft's chance times the tokens that may
    follow. The floor is where the best m breaks even.
    """
    floors = []
    for j in range(1, len(prices)):
        floor, gain, share = math.inf, 0.0, 1.0
        for m in range(j + 1, len(prices)):
            share *= chances[m - 1]
            gain += share
            floor = min(floor, worth * max(0.0, prices[m] - prices[j]) / max(gain, 1e-9))
        floors.append(min(floor, 1e9))
    return tuple(floors)

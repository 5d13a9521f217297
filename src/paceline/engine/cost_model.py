"""What steps cost on this machine, learned from the steps themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

GUESSED_ROW = 0.12  # what a drafted token adds to a step before anything is known, in plain steps
GUESSED = 0.5  # weight of what is expected when the first time comes
MEMORY = 100.0  # times that a mean is taken over: long, so that a change of all prices is not taken for one of its own
SPEED_RATE = 0.15  # how fast all prices follow a machine that gets slower or faster
FEW = 2  # times
KNOWN = 4.0  # times after which an error is the machine's and not the price's
OUTLIER = 2.0  # one time counts for at most so many times what was expected


@dataclass
class _Mean:
    ms: float
    rows: float
    weight: float = GUESSED

    def add(self, ms: float, rows: int) -> None:
        self.weight = min(self.weight + 1, MEMORY)
        self.ms += (ms - self.ms) / self.weight
        self.rows += (rows - self.rows) / self.weight


@dataclass
class StepCosts:
    """Milliseconds of steps in which `count` sequences decode.

    Steps are told apart by the length of their drafts: of the drafter's, which takes as many steps of its own, and of
    others, which are there already. A length not seen yet is priced by the line through those beside it: few steps tell
    much, and kernels may have stairs. What accepted tokens cost, to sample and to write, is part of it.
    """

    count: int
    observed: int = 0
    plain_seen: int = 0  # of these, without drafts
    plain_at: int = 0  # number of the last of them
    _plain: float = 0.0
    _drafted: dict[int, _Mean] = field(default_factory=dict)  # by length
    _given: dict[int, _Mean] = field(default_factory=dict)
    _speed: float = 1.0  # recent times by what was expected

    @property
    def plain(self) -> float:
        """Price of a step without drafts."""
        return self._speed * self._plain

    @property
    def longest(self) -> int:
        """The longest draft of the drafter's that was seen."""
        return max(self._drafted, default=0)

    def seen(self, length: int) -> bool:
        """Whether drafts of the drafter's had that length a few times."""
        return length in self._drafted and self._drafted[length].weight > FEW

    def price(self, length: int, rows: float | None = None, *, given: bool = False) -> float:
        """Price of a step whose longest draft has that length.

        Args:
            length: tokens.
            rows: tokens of all drafts; without it, all are as long.
            given: whether the tokens are there already.
        """
        share = 1.0 if rows is None else rows / (self.count * max(length, 1))
        return self._speed * (self._plain + share * self._added(length, self._given if given else self._drafted))

    def _added(self, length: int, means: dict[int, _Mean]) -> float:
        """What drafts of that length of all sequences add to a plain step."""
        if not length:
            return 0.0
        if length in means:
            mean = means[length]
            return max(mean.ms - self._plain, 0.0) * self.count * length / mean.rows
        below = max((other for other in means if other < length), default=0)
        above = min((other for other in means if other > length), default=0)
        low = self._added(below, means)
        if above:
            return low + (self._added(above, means) - low) * (length - below) / (above - below)
        if means is self._given and below < length <= self.longest:  # a step of the drafter's takes a little
            return self._added(length, self._drafted)
        slope = GUESSED_ROW * self._plain * math.sqrt(self.count)
        if below:  # the average, or that of the end if it is less: what is taken for cheap is tried, and then known
            before = max((other for other in means if other < below), default=0)
            slope = min(low / below, max((low - self._added(before, means)) / (below - before), slope / 4))
        return low + slope * (length - below)

    def observe(self, length: int, rows: int, ms: float, *, given: bool = False) -> float:
        """A step took that long; its longest draft and all drafts together had so many tokens.

        Returns:
            What of its milliseconds counts: an outlier does in part.
        """
        self.observed += 1
        if not self._plain:
            self._plain = max(ms, 1e-3)
        speed, means = self._speed, self._given if given else self._drafted
        expected = self.price(length, rows, given=given) if rows else self.plain
        ratio = min(max(ms / expected, 1 / OUTLIER), OUTLIER)
        usual = ratio * expected
        if rows:
            if length not in means:
                means[length] = _Mean(expected / speed, rows)
            means[length].add(usual / speed, rows)
            known = means[length].weight >= KNOWN
        else:
            self.plain_at, self.plain_seen = self.observed, self.plain_seen + 1
            known = self.plain_seen > FEW
            if known:
                self._plain += (usual / speed - self._plain) / min(self.plain_seen, MEMORY)
            else:  # the first ones may find caches cold
                now = max(ms / speed, 1e-3)
                self._plain = now if self.plain_seen == 1 else min(now, self._plain)
        if known:
            self._speed *= ratio**SPEED_RATE
        return usual

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
    weight: float = GUESSED

    def add(self, ms: float) -> None:
        self.weight = min(self.weight + 1, MEMORY)
        self.ms += (ms - self.ms) / self.weight


@dataclass
class StepCosts:
    """Milliseconds of steps in which `count` sequences decode.

    Steps are told apart by the rows that all their drafts add, because kernels have stairs: with drafts of the
    drafter's, which takes steps of its own, and with others, which are there already. A number not seen yet is priced
    by the line through those beside it, below the smallest one by a root, because the first rows cost most: few steps
    tell much. What accepted tokens cost, to sample and to write, is part of it, and so are the drafter's steps: several
    sequences mostly draft equally far.
    """

    count: int
    credit: float = 0.0  # plain rounds that drafting may lose; see draft_control
    observed: int = 0
    plain_seen: int = 0  # of these, without drafts
    plain_at: int = 0  # number of the last of them
    longest: int = 0  # tokens of a draft of the drafter's
    _plain: float = 0.0
    _drafted: dict[int, _Mean] = field(default_factory=dict)  # by rows
    _given: dict[int, _Mean] = field(default_factory=dict)
    _speed: float = 1.0  # recent times by what was expected

    @property
    def plain(self) -> float:
        """Price of a step without drafts."""
        return self._speed * self._plain

    def seen(self, rows: int) -> bool:
        """Whether drafts of the drafter's had so many tokens a few times."""
        return rows in self._drafted and self._drafted[rows].weight > FEW

    def price(self, rows: int, *, given: bool = False) -> float:
        """Price of a step whose drafts have so many tokens together; `given`: they are there already."""
        return self._speed * (self._plain + self._added(rows, self._given if given else self._drafted))

    def _added(self, rows: int, means: dict[int, _Mean]) -> float:
        """What so many drafted tokens add to a plain step."""
        if not rows:
            return 0.0
        if rows in means:
            return max(means[rows].ms - self._plain, 0.0)
        below = max((other for other in means if other < rows), default=0)
        above = min((other for other in means if other > rows), default=0)
        low = self._added(below, means)
        if above:
            share = (rows - below) / (above - below)
            return low + (self._added(above, means) - low) * (share if below else math.sqrt(share))
        if means is self._given and rows <= max(self._drafted, default=0):  # a step of the drafter's takes a little
            return self._added(rows, self._drafted)
        slope = GUESSED_ROW * self._plain / math.sqrt(self.count)
        if below:  # the average, or that of the end if it is less: what is taken for cheap is tried, and then known
            before = max((other for other in means if other < below), default=0)
            slope = min(low / below, max((low - self._added(before, means)) / (below - before), slope / 4))
        return low + slope * (rows - below)

    def observe(self, length: int, rows: int, ms: float) -> float:
        """A step took that long; the longest draft of the drafter's and all drafts together had so many tokens.

        Returns:
            What of its milliseconds counts: an outlier does in part.
        """
        self.observed += 1
        if not self._plain:
            self._plain = max(ms, 1e-3)
        speed, means = self._speed, self._drafted if length else self._given
        expected, self.longest = self.price(rows, given=not length), max(self.longest, length)
        ratio = min(max(ms / expected, 1 / OUTLIER), OUTLIER)
        usual = ratio * expected
        if rows:
            mean = means.setdefault(rows, _Mean(expected / speed))
            mean.add(usual / speed)
            known = mean.weight >= KNOWN
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

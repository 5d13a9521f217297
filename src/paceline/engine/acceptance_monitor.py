"""Notices where few drafts are accepted, and says once why, as far as that can be checked. Texts are not affected."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from paceline.engine.sequence import Sequence

USUAL = 0.75  # of first drafts: official pairs of 26B and 31B accept 0.77 to 0.89 (docs/architecture.md)
LOW = 0.4  # of what is usual, or of what it is elsewhere: fine-tuned targets accept 3 to 13 %
ENOUGH = 40  # first drafts, before anything is said
KEEP = 1 - 1 / 512  # of the counts, for each new one
LONG_CONTEXT = 8192  # tokens

SITUATIONS = {
    "reasoning": "where reasoning is on",
    "raw_text": "in raw text, to which no chat template was applied",
    "grammar": "in text that follows a schema or grammar",
    "high_temperature": "at temperatures above 1",
    "long_context": f"after {LONG_CONTEXT:,} tokens of context",
}
"""What may make a drafter worse, and how that is called in a sentence."""
UNKNOWN = "the files do not say why; is the model fine-tuned, or the drafter of another revision?"


@dataclass
class _Count:
    tried: float = 0.0
    kept: float = 0.0

    @property
    def rate(self) -> float:
        return self.kept / self.tried if self.tried else 0.0

    def add(self, accepted: bool) -> None:
        self.tried, self.kept = KEEP * self.tried + 1, KEEP * self.kept + accepted

    def below(self, usual: float) -> bool:
        """Whether the rate is surely low beside that one: by two standard errors."""
        rate = self.rate
        return self.tried >= ENOUGH and rate + 2 * math.sqrt(rate * (1 - rate) / self.tried) < LOW * usual


@dataclass
class AcceptanceMonitor:
    """Counts first drafts of the drafter's.

    Args:
        doubts: what the files say against the pair, likeliest first (`checkpoint.pair_doubts`).
        notify: receives each finding once. What it raises is dropped, because texts must go on.
    """

    doubts: Items[str] = ()
    notify: Callable[[str], None] = lambda _: None
    cause: str = ""  # of the acceptance that is low now: a situation, "text" or "pair"
    _all: _Count = field(default_factory=_Count)
    _by_situations: dict[tuple[str, ...], _Count] = field(default_factory=dict)
    _fitted: bool = False  # acceptance was usual once
    _said: set[str] = field(default_factory=set)

    @property
    def rate(self) -> float:
        """Share of first drafts that was accepted recently."""
        return self._all.rate

    def observe(self, sequence: Sequence, accepted: bool) -> None:
        """The first draft of a round was accepted, or not."""
        found = sequence.situations
        if sequence.grammar:
            found += ("grammar",)
        if sequence.params.temperature > 1:
            found += ("high_temperature",)
        if len(sequence.tokens) > LONG_CONTEXT:
            found += ("long_context",)
        if found not in self._by_situations:
            self._by_situations[found] = _Count()
        self._by_situations[found].add(accepted)
        self._all.add(accepted)

    def examine(self) -> None:
        """A text has ended: find out whether acceptance is low, and why."""
        counts = {name: (self._count(name, True), self._count(name, False)) for name in SITUATIONS}
        low = {
            name: here.rate / elsewhere.rate
            for name, (here, elsewhere) in counts.items()
            if elsewhere.tried >= ENOUGH and here.below(elsewhere.rate)
        }
        accepted = f"{self.rate:.0%} of first drafts are accepted"
        if low:
            name = min(low, key=low.__getitem__)
            here, elsewhere = counts[name]
            line = f"{here.rate:.0%} of first drafts are accepted {SITUATIONS[name]}, {elsewhere.rate:.0%} elsewhere"
            self._find(name, line)
        elif not self._all.below(USUAL):
            self.cause = ""
            self._fitted |= self._all.tried >= ENOUGH and self.rate > 2 * LOW * USUAL
        elif self._fitted:
            self._find("text", f"{accepted}, and more were before; is the text of another kind?")
        else:
            always = [SITUATIONS[name] for name, (_, elsewhere) in counts.items() if not elsewhere.tried]
            why = [*self.doubts, *(f"all of this was {phrase}" for phrase in always)] or [UNKNOWN]
            self._find("pair", f"{accepted}, {USUAL:.0%} are usual: {'; '.join(why)}")

    def _count(self, name: str, there: bool) -> _Count:
        """First drafts in a situation, or elsewhere."""
        counts = [count for found, count in self._by_situations.items() if (name in found) == there]
        return _Count(sum(count.tried for count in counts), sum(count.kept for count in counts))

    def _find(self, cause: str, line: str) -> None:
        self.cause = cause
        if cause not in self._said:
            self._said.add(cause)
            with contextlib.suppress(Exception):
                self.notify(f"drafter: {line} (texts are not affected)")

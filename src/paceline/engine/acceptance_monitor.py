"""Notices where few drafts are accepted, and says once why, as far as that can be checked. Texts are not affected."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from paceline.engine.sequence import Sequence

USUAL = 0.75  # of first drafts: official pairs of 26B and 31B accept 0.77 to 0.89 (docs/architecture.md)
LOW = 0.4  # of what is usual, or was before: fine-tuned targets accept 3 to 13 %
ENOUGH = 40  # first drafts, before anything is said
KEEP = 1 - 1 / 512  # of the counts, for each new one
LONG_CONTEXT = 8192  # tokens

SITUATIONS = {
    "reasoning": "in reasoning",
    "raw_text": "in raw text, without the chat template",
    "grammar": "in text that follows a schema or grammar",
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


@dataclass
class AcceptanceMonitor:
    """Counts first drafts of the drafter's.

    Args:
        doubts: what the files say against the pair, likeliest first (`checkpoint.pair_doubts`).
        notify: receives each finding, once.
    """

    doubts: Items[str] = ()
    notify: Callable[[str], None] = lambda _: None
    causes: list[str] = field(default_factory=list)  # found: a situation, "pair" or "text"
    _all: _Count = field(default_factory=_Count)
    _by_situations: dict[tuple[str, ...], _Count] = field(default_factory=dict)
    _best: float = 0.0  # rate that was seen

    @property
    def rate(self) -> float:
        """Share of first drafts that was accepted recently."""
        return self._all.rate

    def observe(self, sequence: Sequence, accepted: bool) -> None:
        """The first draft of a round was accepted, or not."""
        found = sequence.situations
        if sequence.grammar:
            found += ("grammar",)
        if len(sequence.tokens) > LONG_CONTEXT:
            found += ("long_context",)
        if found not in self._by_situations:
            self._by_situations[found] = _Count()
        self._by_situations[found].add(accepted)
        self._all.add(accepted)

    def examine(self) -> None:
        """A text has ended: say what was found."""
        if self._all.tried < ENOUGH:
            return
        rate, before, explained = self._all.rate, self._best, False
        accepted = f"{rate:.0%} of first drafts are accepted"
        for name, phrase in SITUATIONS.items():
            here, elsewhere = self._count(name, True), self._count(name, False)
            if min(here.tried, elsewhere.tried) >= ENOUGH and here.rate < LOW * elsewhere.rate:
                self._say(name, f"{here.rate:.0%} of first drafts are accepted {phrase}, {elsewhere.rate:.0%} else")
                explained = True
        if not explained and rate < LOW * before:
            self._say("text", f"{accepted}, {before:.0%} were before; is the text of another kind?")
        elif not explained and rate < LOW * USUAL:
            always = [
                name for name in SITUATIONS if self._count(name, True).tried >= ENOUGH > self._count(name, False).tried
            ]
            why = [*self.doubts, *(f"all of this was {SITUATIONS[name]}" for name in always)] or [UNKNOWN]
            self._say("pair", f"{accepted}, {USUAL:.0%} are usual: {'; '.join(why)}")
        self._best = max(before, rate)

    def _count(self, name: str, there: bool) -> _Count:
        """First drafts in a situation, or elsewhere."""
        counts = [count for found, count in self._by_situations.items() if (name in found) == there]
        return _Count(sum(count.tried for count in counts), sum(count.kept for count in counts))

    def _say(self, cause: str, line: str) -> None:
        if cause not in self.causes:
            self.causes.append(cause)
            self.notify(f"drafter: {line} (texts are not affected)")

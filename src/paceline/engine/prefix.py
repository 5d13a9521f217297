"""Beginnings of prompts that were read before: copies of cache rows, kept in bounded memory.

A snapshot holds a slot's rows at one moment. A prompt that begins with the same tokens takes them over and reads only
what is new; the rows are the same bits that reading would give, so the text is the same. Sliding rings forget, so a
snapshot can be cut back only a little. Snapshots are therefore taken where later prompts are likely to branch off: at
the end of a prompt (the next try), at the end of a text (the next turn), and where a prompt was seen to branch off from
an earlier one (the end of a shared system prompt).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from paceline.backends.base import Copies, Snapshot
from paceline.types import Int32

LEAST_TOKENS = 16  # shorter beginnings are read again
MOST_SNAPSHOTS = 256  # they are searched one by one


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows and the tokens [length] they are of."""

    tokens: Int32
    rows: Snapshot


@dataclass(frozen=True)
class Match:
    """What is known of a prompt's beginning."""

    length: int = 0  # tokens that need not be read
    branch: int = 0  # where it parts from what was seen, if a snapshot there would be of use to others; 0: nowhere
    kept: Kept | None = None


@dataclass
class PrefixCache:
    """Snapshots, least recently used first.

    Args:
        backend: whose slots are copied.
        memory: bytes they may take together.
    """

    backend: Copies
    memory: int
    _kept: list[Kept] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(kept.rows.nbytes for kept in self._kept)

    @property
    def count(self) -> int:
        return len(self._kept)

    def find(self, tokens: Items[int]) -> Match:
        """The longest beginning of a prompt that a snapshot holds. At least one token is left to read."""
        wanted = np.array(tokens, np.int32)
        best, longest = Match(), 0
        for kept in self._kept:
            common = min(common_length(wanted, kept.tokens), len(wanted) - 1)
            longest = max(longest, common)
            if common >= max(LEAST_TOKENS, kept.rows.shortest, best.length + 1):
                best = Match(common, 0, kept)
        return Match(best.length, longest if longest >= best.length + LEAST_TOKENS else 0, best.kept)

    def restore(self, slot: int, match: Match) -> None:
        """Fill an empty slot with the rows of a match."""
        if match.kept:
            self._kept.remove(match.kept)
            self._kept.append(match.kept)
            self.backend.restore(slot, match.kept.rows)
            self.backend.truncate(slot, match.length)

    def keep(self, slot: int, tokens: Items[int]) -> None:
        """Copy the rows of a slot, which are those of `tokens`, unless they are kept already."""
        mine = np.array(tokens, np.int32)
        if len(mine) < LEAST_TOKENS:
            return
        for kept in self._kept:
            if kept.rows.shortest <= len(mine) == common_length(mine, kept.tokens):
                self._kept.remove(kept)
                self._kept.append(kept)
                return
        rows = self.backend.save(slot)
        if rows.nbytes > self.memory:
            return
        self._kept = [k for k in self._kept if not rows.shortest <= len(k.tokens) == common_length(mine, k.tokens)]
        self._kept.append(Kept(mine, rows))
        while self.nbytes > self.memory or len(self._kept) > MOST_SNAPSHOTS:
            del self._kept[0]


def common_length(first: Int32, second: Int32) -> int:
    """How many tokens two beginnings have in common."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length

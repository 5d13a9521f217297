"""Prefix cache: snapshots of prompts' KV cache in bounded memory.

A prompt that begins with the same tokens as a snapshot starts from it and runs only the rest. The snapshot holds the
bits that prefill would give, so the text is the same. Sliding rings forget: a snapshot can be cut back only a little.
Snapshots are therefore taken where later prompts are likely to branch off: at the end of a prompt (for a retry), at the
end of a text (for the next turn), and where a prompt branched off from an earlier one (after a shared system prompt).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from paceline.backends.base import Backend, Snapshot
from paceline.types import Int32

MIN_TOKENS = 16  # shorter prefixes are not worth a snapshot
MAX_SNAPSHOTS = 256  # they are searched one by one


@dataclass(frozen=True, eq=False)
class Entry:
    """A snapshot and its tokens [length]."""

    tokens: Int32
    snapshot: Snapshot


@dataclass(frozen=True)
class Match:
    """The cached prefix of a prompt."""

    length: int = 0  # tokens
    branch: int = 0  # length at which a snapshot would be of use to later prompts; 0: none
    entry: Entry | None = None


@dataclass
class PrefixCache:
    """Snapshots, least recently used first.

    Args:
        backend: whose slots are copied.
        memory: bytes that all snapshots may take together.
    """

    backend: Backend
    memory: int
    _entries: list[Entry] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.snapshot.nbytes for entry in self._entries)

    @property
    def count(self) -> int:
        return len(self._entries)

    def find(self, tokens: Items[int]) -> Match:
        """The longest cached prefix of a prompt, at least one token shorter than the prompt."""
        prompt = np.array(tokens, np.int32)
        best, longest = Match(), 0
        for entry in self._entries:
            common = min(common_length(prompt, entry.tokens), len(prompt) - 1)
            longest = max(longest, common)
            if common >= max(MIN_TOKENS, entry.snapshot.shortest, best.length + 1):
                best = Match(common, 0, entry)
        return Match(best.length, longest if longest >= best.length + MIN_TOKENS else 0, best.entry)

    def restore(self, slot: int, match: Match) -> None:
        """Fill an empty slot with a cached prefix."""
        if match.entry:
            self._touch(match.entry)
            self.backend.restore(slot, match.entry.snapshot)
            self.backend.truncate(slot, match.length)

    def store(self, slot: int, tokens: Items[int]) -> None:
        """Take a snapshot of a slot that holds `tokens`, unless there is one already."""
        mine = np.array(tokens, np.int32)
        if len(mine) < MIN_TOKENS:
            return None
        for entry in self._entries:
            if entry.snapshot.shortest <= len(mine) == common_length(mine, entry.tokens):
                return self._touch(entry)
        snapshot = self.backend.save(slot)
        if snapshot.nbytes > self.memory:
            return None
        covered = [e for e in self._entries if snapshot.shortest <= len(e.tokens) == common_length(mine, e.tokens)]
        self._entries = [entry for entry in self._entries if entry not in covered] + [Entry(mine, snapshot)]
        while self.nbytes > self.memory or len(self._entries) > MAX_SNAPSHOTS:
            del self._entries[0]
        return None

    def _touch(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)


def common_length(first: Int32, second: Int32) -> int:
    """Length of the longest common prefix."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length

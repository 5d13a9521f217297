"""A backend without a model, for tests of everything above backends; its round is the reference for real ones.

Its "language" is a hash: the logits at a row depend on all tokens of the slot up to it, so a wrong position, a stale
cache row or a mixed-up slot shows in the text. Its drafter knows the truth and lies at a chosen rate. It checks what
callers of `backends.base` promise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from paceline.decode.acceptance import accept
from paceline.decode.sampler import sample
from paceline.errors import BackendError
from paceline.types import BackendInfo, Float32, Result, Work


@dataclass(frozen=True)
class ScriptedSnapshot:
    """See `backends.base.Snapshot`."""

    tokens: tuple[int, ...]
    shortest: int

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return 4 * len(self.tokens)


class ScriptedBackend:
    """Deterministic stand-in for a model pair.

    Args:
        vocab_size: number of tokens.
        context: positions a slot holds.
        slots: sequences held at once.
        max_rows: most rows of one slot in one pass.
        truth: share of drafted tokens that are what the target will sample, in 0..1, but for penalties and bias.
        has_drafter: whether it has a drafter.
        reach: how far a snapshot can be cut back.
        logits: changes the logits of a row, given its tokens: for defects on purpose.
        watch: sees the works of each step.
    """

    threads = 1

    def __init__(
        self,
        vocab_size: int = 64,
        *,
        context: int = 512,
        slots: int = 4,
        max_rows: int = 32,
        truth: float = 0.7,
        has_drafter: bool = True,
        reach: int = 16,
        logits: Callable[[Float32, list[int]], Float32] = lambda row, tokens: row,
        watch: Callable[[Sequence[Work]], None] = lambda works: None,
    ) -> None:
        self.info = BackendInfo(vocab_size, context, slots, max_rows, has_drafter, False, "f32", 0, "none")
        self._truth, self._reach, self._change, self._watch = truth, reach, logits, watch
        self._free = list(range(slots))[::-1]
        self._cache: dict[int, list[int]] = {}
        self._sampled: set[int] = set()  # slots with a hidden state

    def open_slot(self) -> int:
        if not self._free:
            raise BackendError("all cache slots are taken; finish or cancel a sequence first")
        slot = self._free.pop()
        self._cache[slot] = []
        return slot

    def close_slot(self, slot: int) -> None:
        del self._cache[slot]
        self._sampled.discard(slot)
        self._free.append(slot)

    def run(self, works: Sequence[Work]) -> list[Result]:
        self._watch(works)
        if len({work.slot for work in works}) != len(works):
            raise BackendError("two works of one slot")
        return [self._round(work) for work in works]

    def _round(self, work: Work) -> Result:
        cache = self._cache[work.slot]
        drafted = self._propose(work)
        rows = len(work.tokens) + len(drafted)
        if work.position != len(cache) or not work.tokens:
            raise BackendError(f"{len(work.tokens)} tokens at {work.position} where the slot continues at {len(cache)}")
        if rows > self.info.max_rows or len(cache) + rows > self.info.context:
            raise BackendError(f"{rows} rows after {len(cache)} do not fit")
        cache += work.tokens
        if work.params is None:
            return Result()
        history, kept = list(cache), []

        def sampled(row: int) -> int:
            assert work.params
            logits = self._logits([*history, *drafted[:row]])
            kept.append(logits.copy())
            if work.constraint:
                work.constraint.apply(logits)
            return sample(logits, work.params, len(history) + row)

        tokens = accept(work, drafted, sampled)
        cache += drafted[: len(tokens) - 1]
        self._sampled.add(work.slot)
        confidence = (self._truth,) * len(drafted) if work.draft.length else ()
        return Result(tokens, tuple(drafted), confidence, np.array(kept) if work.logits else None)

    def _propose(self, work: Work) -> list[int]:
        if not work.draft.length:
            return list(work.draft.tokens)
        if not self.info.has_drafter or work.slot not in self._sampled or work.params is None or len(work.tokens) != 1:
            raise BackendError(f"slot {work.slot} has no sampled token to draft after")
        tokens = [*self._cache[work.slot], *work.tokens]
        for _ in range(work.draft.length):
            token = sample(self._logits(tokens), work.params, len(tokens))
            lies = self._hash(tokens, "lie") % 1000 >= 1000 * self._truth
            tokens.append((token + lies) % self.info.vocab_size)
        return tokens[-work.draft.length :]

    def save(self, slot: int) -> ScriptedSnapshot:
        return ScriptedSnapshot(tuple(self._cache[slot]), max(0, len(self._cache[slot]) - self._reach))

    def restore(self, slot: int, snapshot: ScriptedSnapshot) -> None:
        if self._cache[slot]:
            raise BackendError(f"slot {slot} is not empty")
        self._cache[slot] = list(snapshot.tokens)

    def truncate(self, slot: int, length: int) -> None:
        if length > len(self._cache[slot]):
            raise BackendError(f"cannot truncate {len(self._cache[slot])} rows to {length}")
        del self._cache[slot][length:]

    def _logits(self, tokens: list[int]) -> Float32:
        generator = np.random.default_rng(self._hash(tokens, "logits"))
        return self._change(generator.standard_normal(self.info.vocab_size, np.float32), tokens)

    @staticmethod
    def _hash(tokens: list[int], what: str) -> int:
        return zlib.crc32(np.array(tokens, np.int32).tobytes(), zlib.crc32(what.encode()))

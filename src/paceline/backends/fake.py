"""A backend without a model, for tests of everything above backends.

Its "language" is a hash: the logits at a row depend on all tokens of the slot up to it, so a wrong position, a stale
cache row or a mixed-up slot shows in the text. Its drafter knows the truth and lies at a chosen rate. It checks the
contract of `backends.base` that callers must keep.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.decode.sampler import allowed, draw
from paceline.errors import BackendError
from paceline.types import Anchors, Batch, Drafts, Float32, Output, Row, SamplingParams

HIDDEN = 4


@dataclass(frozen=True)
class FakeSnapshot:
    """See `backends.base.Snapshot`."""

    tokens: tuple[int, ...]
    shortest: int

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return 4 * len(self.tokens)


class FakeBackend:
    """Deterministic stand-in for a model pair.

    Args:
        vocab_size: number of tokens.
        context: positions a slot can hold.
        slots: sequences held at once.
        max_rows: most rows of one slot in one batch.
        truth: share of drafted tokens that are what the target will draw, in 0..1, but for penalties and bias.
        can_draft: whether it has a drafter.
        reach: how far a snapshot can be cut back.
    """

    def __init__(
        self,
        vocab_size: int = 64,
        *,
        context: int = 512,
        slots: int = 4,
        max_rows: int = 32,
        truth: float = 0.7,
        can_draft: bool = True,
        reach: int = 16,
    ) -> None:
        self.vocab_size = vocab_size
        self.context = context
        self.max_rows = max_rows
        self.can_draft = can_draft
        self.slots = slots
        self._truth = truth
        self._reach = reach
        self._free = list(range(slots))[::-1]
        self._cache: dict[int, list[int]] = {}

    def open_slot(self) -> int:
        if not self._free:
            raise BackendError("all cache slots are taken; finish or cancel a sequence first")
        slot = self._free.pop()
        self._cache[slot] = []
        return slot

    def close_slot(self, slot: int) -> None:
        del self._cache[slot]
        self._free.append(slot)

    def forward(self, batch: Batch) -> Output:
        logits, hidden = [], []
        for slot, position, token, wanted in zip(
            batch.slots.tolist(), batch.positions.tolist(), batch.tokens.tolist(), batch.wanted.tolist(), strict=True
        ):
            cache = self._cache[slot]
            if position != len(cache) or position >= self.context:
                raise BackendError(f"row at position {position} where slot {slot} continues at {len(cache)}")
            cache.append(token)
            if wanted:
                logits.append(self._logits(cache))
                hidden.append(self._hidden(cache))
        return Output(
            np.array(logits, np.float32).reshape(-1, self.vocab_size), np.array(hidden, np.float32).reshape(-1, HIDDEN)
        )

    stops_early = False

    def draw(self, logits: Row, sampling: SamplingParams, position: int) -> int:
        return draw(logits, sampling, position)

    def allowed(self, logits: Row, sampling: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return allowed(logits, sampling)

    def draft(self, anchors: Anchors) -> Drafts:
        depths = [plan.depth for plan in anchors.plans]
        tokens = np.zeros((len(anchors.tokens), max(depths)), np.int32)
        logits = np.zeros((*tokens.shape, self.vocab_size), np.float32)
        for row, (slot, position, newest) in enumerate(
            zip(anchors.slots.tolist(), anchors.positions.tolist(), anchors.tokens.tolist(), strict=True)
        ):
            cache = self._cache[slot]
            if position != len(cache) or not np.array_equal(anchors.hidden[row], self._hidden(cache)):
                raise BackendError(f"an anchor at {position} with a hidden state that is not of row {len(cache) - 1}")
            line = [*cache, newest]
            for step in range(depths[row]):
                logits[row, step] = self._logits(line)
                token = draw(logits[row, step], anchors.samplings[row], position + 1 + step, anchors.streams[row])
                if self._hash(line, "lie") % 1000 >= 1000 * self._truth:
                    token = (token + 1) % self.vocab_size
                tokens[row, step] = token
                line.append(token)
        confidence = np.full(tokens.shape, self._truth, np.float32)
        return Drafts(tokens, confidence, np.array(depths, np.int32), logits if anchors.with_logits else None)

    def save(self, slot: int) -> FakeSnapshot:
        return FakeSnapshot(tuple(self._cache[slot]), max(0, len(self._cache[slot]) - self._reach))

    def restore(self, slot: int, snapshot: FakeSnapshot) -> None:
        if self._cache[slot]:
            raise BackendError(f"slot {slot} is not empty")
        self._cache[slot] = list(snapshot.tokens)

    def truncate(self, slot: int, length: int) -> None:
        if length > len(self._cache[slot]):
            raise BackendError(f"cannot truncate {len(self._cache[slot])} rows to {length}")
        del self._cache[slot][length:]

    def _logits(self, tokens: list[int]) -> Float32:
        generator = np.random.default_rng(self._hash(tokens, "logits"))
        return generator.standard_normal(self.vocab_size, np.float32)

    def _hidden(self, tokens: list[int]) -> Float32:
        return np.full(HIDDEN, self._hash(tokens, "hidden") % 65536, np.float32)

    @staticmethod
    def _hash(tokens: list[int], what: str) -> int:
        return zlib.crc32(np.array(tokens, np.int32).tobytes(), zlib.crc32(what.encode()))

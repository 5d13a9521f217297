"""The measurements: kernels, forward passes by rows, draft steps, prompts, decoding with and without MTP."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from paceline.backends.base import Backend
from paceline.backends.cpu.backend import CpuBackend
from paceline.bench.machine import Bandwidth, DotPeaks
from paceline.engine.draft_control import DraftControl
from paceline.engine.proposers import PromptLookup
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.text.detokenizer import Detokenizer
from paceline.types import GREEDY, Draft, Result, Work

PASS_ROWS = range(1, 17)
GOLDEN_RATIO = 0.6180339887498949
REAL_ROWS = 1024  # of a context at least; what is before them is filled with random keys and values where that can be


@dataclass
class Bench:
    """A loaded pair with `context` random tokens in a slot, measured again and again.

    Args:
        backend: the pair, with room for `context` and what decoding adds.
        context: rows in the cache before each measurement.
        chunk: prompt tokens in one pass.
        bandwidth: probed between measurements, so that both see the same machine.
        peaks: probed likewise; None where no arithmetic is compared.
    """

    backend: Backend
    context: int
    chunk: int
    bandwidth: Bandwidth
    peaks: DotPeaks | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self.slot = self.open_filled()

    def probe(self) -> None:
        """Measure the machine's limits once more."""
        self.bandwidth.measure()
        if self.peaks:
            self.peaks.measure()

    def extend(self, context: int) -> None:
        """Go on to a longer context."""
        before, self.context = self.context, context
        self._fill(self.slot, before)

    def forward_ms(self, repeats: int, batches: Iterable[int] = PASS_ROWS) -> dict[int, float]:
        """Median milliseconds of a pass of so many rows with a token sampled from each, batch sizes interleaved."""
        times: dict[int, list[float]] = {rows: [] for rows in batches}
        for _ in range(repeats):
            self.probe()
            self._verify(self._tokens(1))  # not measured: its threads may still share a core with those of the probe
            self.backend.truncate(self.slot, self.context)
            for rows, seen in times.items():
                seen.append(milliseconds(partial(self._verify, self._tokens(rows))))
                self.backend.truncate(self.slot, self.context)
        return {rows: statistics.median(seen) for rows, seen in times.items()}

    def same_bits(self, rows: int = 16) -> bool:
        """Whether rows of one pass have the logits that passes of one row give them, to the last bit."""
        tokens = self._tokens(rows)
        together = self._verify(tokens, logits=True).logits
        self.backend.truncate(self.slot, self.context)
        alone = [self._verify([token], self.context + i, logits=True).logits for i, token in enumerate(tokens)]
        self.backend.truncate(self.slot, self.context)
        first, second = (np.asarray(found, np.float32).ravel().view(np.uint32) for found in (alone, together))
        return np.array_equal(first, second)

    def draft_step_ms(self, repeats: int, length: int = 4) -> float:
        """Median milliseconds of one draft step: what rounds with drafts take beyond the pass that verifies them."""
        seen = []
        for _ in range(repeats):
            drafting = milliseconds(lambda: self._verify(self._tokens(1), draft=Draft(length=length, simulated=length)))
            self.backend.truncate(self.slot, self.context)
            verifying = milliseconds(partial(self._verify, self._tokens(length + 1)))
            self.backend.truncate(self.slot, self.context)
            seen.append((drafting - verifying) / length)
        return statistics.median(seen)

    def _verify(
        self, tokens: list[int], position: int | None = None, draft: Draft | None = None, logits: bool = False
    ) -> Result:
        """A round after the context: all tokens but the first are a draft that is accepted whole."""
        draft = draft or Draft(tuple(tokens[1:]), simulated=len(tokens) - 1)
        at = self.context if position is None else position
        return self.backend.run([Work(self.slot, at, tokens[:1], GREEDY, draft, logits=logits)])[0]

    def prompt_tokens_per_s(self, repeats: int, tokens: int = 512) -> float:
        """Median speed of prefill, until the first sampled token. Leaves the slot as it found it."""
        seen = []
        for _ in range(repeats):
            self._reopen()
            seen.append(tokens / milliseconds(lambda: self._prefill(self.slot, tokens)) * 1e3)
        self._refill()
        return statistics.median(seen)

    def decode_tokens_per_s(
        self,
        tokens: int,
        draft_tokens: int | None,
        shares: tuple[float, ...] | None,
    ) -> float:
        """Speed of the engine's loop over about that many tokens.

        Args:
            tokens: how many, at least.
            draft_tokens: a round; None for as many as pay, from a cold start.
            shares: simulated acceptance by depth; None for the pair's.
        """
        sequence, advance = self.start_text(self.slot, draft_tokens, shares)
        start, first = time.perf_counter(), len(sequence.tokens)
        while len(sequence.tokens) - first < tokens:
            advance()
        speed = (len(sequence.tokens) - first) / (time.perf_counter() - start)
        if len(sequence.tokens) - self.context <= tokens_to_undo(self.backend):
            self.backend.truncate(self.slot, self.context)
        else:  # too far for the sliding rings
            self._refill()
        return speed

    def start_text(
        self,
        slot: int,
        draft_tokens: int | None,
        shares: tuple[float, ...] | None,
        simulation: Callable[..., SimulatedAcceptance] | None = None,
    ) -> tuple[Sequence, Callable[[], object]]:
        """A text of the engine's loop in a slot that holds the context, its prefill done, and what advances it a round.

        Args:
            slot: of the backend.
            draft_tokens: a round; None for as many as pay, from a cold start.
            shares: simulated acceptance by depth; None for the pair's.
            simulation: of something else, too.
        """
        info = self.backend.info
        proposer = DraftControl(info.has_drafter, info.stops_early)
        if shares is not None:
            proposer = (simulation or SimulatedAcceptance)(info.has_drafter, stops_early=False, shares=shares)
        sequence = Sequence(
            slot=slot,
            tokens=self._tokens(self.context + 1),
            params=GREEDY,
            draft_tokens=draft_tokens,
            max_tokens=1 << 30,
            limit=self.backend.info.context,
            stop_ids=frozenset(),
            detokenizer=Detokenizer(None, lambda _: None),  # no text
            cached=self.context,
        )
        proposer.begin(sequence)
        advance = partial(step, self.backend, (proposer,), [sequence], self.chunk)
        advance()  # the end of the prefill
        return sequence, advance

    def open_filled(self) -> int:
        """Another slot that holds the context."""
        slot = self.backend.open_slot()
        self._fill(slot)
        return slot

    def _reopen(self) -> None:
        self.backend.close_slot(self.slot)
        self.slot = self.backend.open_slot()

    def _refill(self) -> None:
        """Fill the slot with `context` tokens again."""
        self._reopen()
        self._fill(self.slot)

    def _fill(self, slot: int, first: int = 0) -> None:
        """Fill a slot, which has `first` tokens, with `context` of them."""
        real = self.context - REAL_ROWS
        if real > first and isinstance(self.backend, CpuBackend):
            self.backend.fill_random(slot, real)
            first = real
        self._prefill(slot, self.context, first)

    def _prefill(self, slot: int, tokens: int, first: int = 0) -> None:
        """Run a random prompt in chunks; its last row samples a token, so that rounds can follow."""
        for start in range(first, tokens, self.chunk):
            rows = min(self.chunk, tokens - start)
            params = GREEDY if start + rows == tokens else None
            self.backend.run([Work(slot, start, self._tokens(rows), params)])

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, self.backend.info.vocab_size, count)]


@dataclass
class SimulatedAcceptance(DraftControl):
    """Rounds run for real, and only how many drafted tokens are accepted is SIMULATED: random weights accept none.

    `shares[i]` is the share of rounds in which the draft at depth i + 1 is accepted; it never rises. Rounds take their
    outcomes from a low-discrepancy sequence, so the shares hold closely over few rounds.
    """

    shares: tuple[float, ...] = ()
    _round: int = 0

    def guess(self, sequence: Sequence, lookup: PromptLookup, most: int) -> tuple[list[int], list[float]]:
        return [], []  # a text that is SIMULATED says nothing of repeats

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        draft = super().propose(sequence, most)
        if draft is None or not draft.length:
            return draft
        self._round += 1
        accepted = sum((self._round * GOLDEN_RATIO) % 1.0 < share for share in self.shares)
        return replace(draft, simulated=accepted)


def tokens_to_undo(backend: Backend) -> int:
    """How many rows can surely be rolled back: what sliding rings hold beyond their window, less a round."""
    return backend.info.max_rows - 32


def milliseconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3

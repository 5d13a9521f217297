"""The measurements: kernels, forward passes by rows, draft steps, prompts, decoding with and without MTP."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from paceline import _cpu
from paceline.backends.base import Backend
from paceline.bench.machine import Bandwidth, ReadBandwidth
from paceline.bench.simulated import Script
from paceline.decode.draft_length import Costs
from paceline.decode.rules import Coupled, Rule
from paceline.engine.cost_model import Silent, measure_costs
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.types import Anchors, Batch, Float32, Plan, SamplingParams

KERNEL_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
KERNEL_SHAPE = (6144 * 32, 1536)  # far more than any cache in every format
PASS_ROWS = range(1, 17)


@dataclass
class Bench:
    """A loaded pair with `context` random tokens in its only slot, measured again and again.

    Args:
        backend: the pair, with room for `context` and what decoding adds.
        context: rows in the cache before each measurement.
        chunk: prompt tokens read in one pass.
        bandwidth: probed between measurements, so that both see the same machine.
    """

    backend: Backend
    context: int
    chunk: int
    bandwidth: Bandwidth
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self.slot = self.backend.open_slot()
        self.hidden = self._read(self.context)

    def forward_ms(self, repeats: int) -> dict[int, float]:
        """Median milliseconds of a pass of 1 to 16 rows, all wanted, the heights taken in turn."""
        times: dict[int, list[float]] = {rows: [] for rows in PASS_ROWS}
        for _ in range(repeats):
            self.bandwidth.measure()
            for rows, seen in times.items():
                batch = self._batch(self.context, rows, wanted=rows)
                seen.append(milliseconds(partial(self.backend.forward, batch)))
                self.backend.truncate(self.slot, self.context)
        return {rows: statistics.median(seen) for rows, seen in times.items()}

    def same_bits(self, rows: int = 16) -> bool:
        """Whether rows of one pass have the logits that passes of one row give them, to the last bit."""
        batch = self._batch(self.context, rows, wanted=rows)
        together = np.array(self.backend.forward(batch).logits)
        self.backend.truncate(self.slot, self.context)
        same = True
        for row in range(rows):
            one = slice(row, row + 1)
            part = Batch(batch.slots[one], batch.positions[one], batch.tokens[one], batch.wanted[one])
            alone = np.array(self.backend.forward(part).logits)
            same = same and np.array_equal(alone.view(np.uint32)[0], together.view(np.uint32)[row])
        self.backend.truncate(self.slot, self.context)
        return same

    def draft_step_ms(self, repeats: int, depth: int = 4) -> float:
        """Median milliseconds of one draft step."""
        anchor = Anchors(
            slots=np.array([self.slot], np.int32),
            positions=np.array([self.context], np.int32),
            tokens=self._tokens(1),
            hidden=self.hidden,
            samplings=(SamplingParams(),),
            plans=(Plan(depth),),
            streams=(0,),
        )
        return statistics.median(
            milliseconds(lambda: self.backend.draft(anchor).settled()) / depth for _ in range(repeats)
        )

    def prompt_tokens_per_s(self, repeats: int, tokens: int = 512) -> float:
        """Median speed of reading a prompt, until its last logits. Leaves the slot as it found it."""
        seen = []
        for _ in range(repeats):
            self.backend.close_slot(self.slot)
            self.slot = self.backend.open_slot()
            seen.append(tokens / milliseconds(lambda: self._read(tokens)) * 1e3)
        self._reread()
        return statistics.median(seen)

    def costs(self) -> Costs:
        """Costs of rounds, as the engine measures them at load. Leaves the slot as it found it."""
        self.backend.close_slot(self.slot)
        costs = measure_costs(self.backend, SamplingParams())
        self.slot = self.backend.open_slot()
        self.hidden = self._read(self.context)
        return costs

    def _reread(self) -> None:
        """Fill the slot with `context` tokens again."""
        self.backend.close_slot(self.slot)
        self.slot = self.backend.open_slot()
        self.hidden = self._read(self.context)

    def decode_tokens_per_s(
        self, tokens: int, draft_tokens: int | None, shares: tuple[float, ...] | None, costs: Costs | None = None
    ) -> float:
        """Speed of the real engine loop over about that many tokens.

        Args:
            tokens: how many, at least.
            draft_tokens: a round; None for as many as pay by `costs`, from a cold start.
            shares: simulated acceptance by depth; None for the pair's own.
            costs: of rounds.
        """
        backend: Backend = self.backend
        rule: Rule = Coupled(drawer=self.backend.draw)
        if shares is not None and draft_tokens != 0:
            backend = rule = Script(self.backend, shares)
        sequence = Sequence(
            slot=self.slot,
            tokens=[*self._tokens(self.context).tolist(), int(self._tokens(1)[0])],
            rule=rule,
            draft_tokens=draft_tokens,
            max_tokens=1 << 30,
            limit=self.backend.context,
            stop_ids=frozenset(),
            detokenizer=Silent(),
            cached=self.context,
            hidden=self.hidden[0],
            costs=costs,
        )
        start, first = time.perf_counter(), len(sequence.tokens)
        while len(sequence.tokens) - first < tokens:
            step(backend, [sequence], self.chunk)
        speed = (len(sequence.tokens) - first) / (time.perf_counter() - start)
        if len(sequence.tokens) - first <= tokens_to_undo(self.backend):
            self.backend.truncate(self.slot, self.context)
        else:  # too far for the sliding rings
            self._reread()
        return speed

    def _read(self, tokens: int) -> Float32:
        """Run a random prompt through the slot, and return the hidden state of its last row [1, hidden]."""
        for start in range(0, tokens, self.chunk):
            rows = min(self.chunk, tokens - start)
            output = self.backend.forward(self._batch(start, rows, wanted=int(start + rows == tokens)))
        return output.hidden.copy()

    def _batch(self, position: int, rows: int, wanted: int) -> Batch:
        return Batch(
            slots=np.full(rows, self.slot, np.int32),
            positions=np.arange(position, position + rows, dtype=np.int32),
            tokens=self._tokens(rows),
            wanted=np.arange(rows) >= rows - wanted,
        )

    def _tokens(self, count: int) -> np.typing.NDArray[np.int32]:
        return self._random.integers(0, self.backend.vocab_size, count, np.int32)


def tokens_to_undo(backend: Backend) -> int:
    """How many rows can surely be rolled back: what sliding rings hold beyond their window, less a round."""
    return backend.max_rows - 32


def kernel_gb_per_s(
    quant: str, threads: int, isa: str, repeats: int, bandwidth: ReadBandwidth, rows: Iterable[int] = KERNEL_ROWS
) -> dict[int, float]:
    """Weight bytes a second of the matrix kernel, by batch rows: medians, the heights taken in turn."""
    outputs, columns = KERNEL_SHAPE
    matrix = _cpu.Matrix(quant, outputs, columns)
    matrix.fill_random(0)
    generator = np.random.default_rng(0)
    inputs = {n: generator.standard_normal((n, columns), np.float32) for n in rows}
    out = {n: np.empty((n, outputs), np.float32) for n in rows}
    times: dict[int, list[float]] = {n: [] for n in rows}
    for _ in range(repeats):
        bandwidth.measure()
        for n, seen in times.items():
            seen.append(milliseconds(partial(_cpu.matmul, matrix, inputs[n], out[n], isa, threads)))
    return {n: matrix.nbytes / statistics.median(seen) / 1e6 for n, seen in times.items()}


def milliseconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3

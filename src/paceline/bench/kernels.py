"""Speed of the matrix kernels: one matrix that no cache holds, by 1 to 64 rows."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from paceline import _cpu
from paceline.bench.demand import Demand, compared
from paceline.bench.machine import DotPeaks, ReadBandwidth
from paceline.bench.runs import milliseconds

KERNEL_ROWS = (1, 2, 4, 5, 8, 16, 64)
KERNEL_SHAPE = (6144 * 32, 1536)  # far more than any cache in every format


class KernelBench:
    """The kernels of instruction sets in turns, and the machine's limits in between.

    Args:
        isas: names of instruction sets.
        threads: of the kernels, and for the limits.
        repeats: of each measurement; medians count.
    """

    def __init__(self, isas: Sequence[str], threads: int, repeats: int) -> None:
        self.bandwidth = ReadBandwidth(threads)
        self._isas, self._threads, self._repeats = isas, threads, repeats

    def run(self, fmt: str, rows: Iterable[int] = KERNEL_ROWS) -> dict[str, dict[str, dict[str, Any]]]:
        """What `demand.compared` finds for a weight format, by instruction set and rows."""
        outputs, columns = KERNEL_SHAPE
        matrix = _cpu.Matrix(fmt, outputs, columns)
        matrix.fill_random(0)
        generator = np.random.default_rng(0)
        inputs = {n: generator.standard_normal((n, columns), np.float32) for n in rows}
        out = {n: np.empty((n, outputs), np.float32) for n in rows}
        peaks = {isa: DotPeaks([fmt], isa, self._threads) for isa in self._isas}
        times: dict[str, dict[int, list[float]]] = {isa: {n: [] for n in inputs} for isa in self._isas}
        reads = []
        for _ in range(self._repeats):
            reads.append(self.bandwidth.measure())
            for peak in peaks.values():
                peak.measure()
            for n, x in inputs.items():
                for isa in self._isas:
                    times[isa][n].append(milliseconds(partial(_cpu.matmul, matrix, x, out[n], isa, self._threads)))
        read = statistics.median(reads)

        def figures(seen: Mapping[int, list[float]], peak: DotPeaks) -> dict[str, dict[str, Any]]:
            demands = {n: Demand(matrix.nbytes, Counter({fmt: outputs * columns * n})) for n in seen}
            return {str(n): compared(statistics.median(ms), demands[n], read, peak.medians) for n, ms in seen.items()}

        return {isa: figures(times[isa], peaks[isa]) for isa in self._isas}

"""What the machine itself can do: the limits that figures are compared with."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from paceline import _cpu


class Bandwidth(Protocol):
    """What memory gives, measured now and then during a run."""

    def measure(self) -> float:
        """GB/s of one measurement."""

    @property
    def median(self) -> float:
        """GB/s, the median of what was seen."""


BUFFER = 1 << 30  # bytes; far more than any cache
PEAK_SECONDS = 0.01  # a measurement of the arithmetic takes at least this
FIRST_STEPS = 1 << 14


class ReadBandwidth:
    """Reads a gigabyte with all threads; call it now and then during a run and take the median of what it saw.

    Args:
        threads: as many as the measured code uses.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._data = np.ones(BUFFER, np.uint8)  # ones: untouched zero pages would all be one page
        self.seen: list[float] = []  # GB/s

    def measure(self) -> float:
        """Bandwidth of one reading, in GB/s."""
        start = time.perf_counter()
        _cpu.checksum([self._data], self._threads)
        self.seen.append(BUFFER / (time.perf_counter() - start) / 1e9)
        return self.seen[-1]

    @property
    def median(self) -> float:
        return statistics.median(self.seen)


class DotPeaks:
    """Does multiply-adds in registers with all threads, as the kernels of each weight format do them; call it likewise.

    Args:
        formats: whose dot products.
        isa: instruction set, empty for the best one.
        threads: as many as the measured code uses.
    """

    def __init__(self, formats: Iterable[str], isa: str, threads: int) -> None:
        self._isa, self._threads = isa, threads
        self._steps = dict.fromkeys(formats, FIRST_STEPS)
        self._seen: dict[str, list[float]] = {fmt: [] for fmt in self._steps}

    def measure(self) -> None:
        for fmt, seen in self._seen.items():
            while True:
                start = time.perf_counter()
                count = _cpu.dot_peak(fmt, self._steps[fmt], self._isa, self._threads)
                elapsed = time.perf_counter() - start
                if elapsed >= PEAK_SECONDS:
                    break
                self._steps[fmt] *= 2
            seen.append(count / elapsed)

    @property
    def medians(self) -> dict[str, float]:
        """Multiply-adds a second by format, the medians of what was seen."""
        return {fmt: statistics.median(seen) for fmt, seen in self._seen.items()}


def peak_memory() -> int:
    """Bytes of memory this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor() -> str:
    """The processor's name, with the family and model that tell its generation where Linux gives them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name", platform.machine())
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name

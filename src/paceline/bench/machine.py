"""What the machine itself can do: the limits that figures are compared with."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
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

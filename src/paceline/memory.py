"""How much memory there is for weights."""

from __future__ import annotations

import os
from pathlib import Path

AUTO_SHARE = 0.7  # of the memory at hand that weights chosen by themselves may take


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

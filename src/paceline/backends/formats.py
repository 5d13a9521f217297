"""Which format weights are held in, whatever the backend."""

from __future__ import annotations

import os
from pathlib import Path

from paceline.checkpoint.sizes import weight_bytes
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import SettingsError
from paceline.quant.blocks import FORMATS

AUTO_SHARE = 0.7  # of the memory at hand that `auto` lets the weights take

# A drafter's format follows its target's, but not below q8: it is small, and its mistakes cost rounds.
DRAFTER_FORMAT = {"f32": "f32", "bf16": "bf16", "q8": "q8", "q4": "q8"}


def check_quant(quant: str) -> None:
    """Raise `SettingsError` unless this is a weight format or auto."""
    if quant not in (*FORMATS, "auto"):
        raise SettingsError(f"unknown quantisation {quant!r}; use one of {', '.join(FORMATS)} or auto")


def choose_quant(config: TargetConfig | DrafterConfig, dtype: str, memory: int) -> str:
    """The most precise format whose weights take at most 70 % of `memory` bytes; q4 if none does.

    A checkpoint in bf16 has nothing to gain from f32, which is chosen only where the files hold it.
    """
    for quant in ("f32", "bf16", "q8") if dtype == "F32" else ("bf16", "q8"):
        if weight_bytes(config, quant) <= AUTO_SHARE * memory:
            return quant
    return "q4"


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

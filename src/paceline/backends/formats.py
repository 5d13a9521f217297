"""Which format weights are held in, whatever the backend."""

from __future__ import annotations

import os
from pathlib import Path

from paceline.checkpoint.sizes import weight_bytes
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import SettingsError
from paceline.quant.recipes import RECIPES

AUTO_SHARE = 0.7  # of the memory at hand that `auto` lets the weights take


def check_quant(quant: str) -> None:
    """Raise `SettingsError` unless this is a weight format or auto."""
    if quant not in (*RECIPES, "auto"):
        raise SettingsError(f"unknown quantisation {quant!r}; use one of {', '.join(RECIPES)} or auto")


def choose_quant(config: TargetConfig | DrafterConfig, dtype: str, memory: int) -> str:
    """The most precise format whose weights take at most 70 % of `memory` bytes; the smallest if none does.

    A checkpoint in bf16 has nothing to gain from f32, which is chosen only where the files hold it.
    """
    candidates = [name for name in RECIPES if name != "f32" or dtype == "F32"]
    fitting = (name for name in candidates if weight_bytes(config, name) <= AUTO_SHARE * memory)
    return next(fitting, candidates[-1])


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

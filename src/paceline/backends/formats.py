"""Which format weights are held in, whatever the backend."""

from __future__ import annotations

from paceline.checkpoint.sizes import weight_bytes
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import SettingsError
from paceline.memory import AUTO_SHARE
from paceline.quant.recipes import RECIPES


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

"""The formats of the KV cache; the layouts are in `csrc/cpu/formats/cache_view.hpp`."""

from __future__ import annotations

from collections.abc import Mapping

from paceline.errors import SettingsError

GROUP = 32  # columns of a head that share a scale in q8, 16 bits

CACHE_FORMATS: Mapping[str, str] = {
    "f32": "as with f32 weights",
    "bf16": "in half of that",
    "q8": "in a quarter, int8 numbers in groups of 32",
}
"""Names, and what they are, in words."""


def check_cache_format(kv: str) -> None:
    """Raise `SettingsError` unless this is a format or auto."""
    if kv not in (*CACHE_FORMATS, "auto"):
        raise SettingsError(f"unknown KV cache format {kv!r}; use one of {', '.join(CACHE_FORMATS)} or auto")


def row_bytes(kv: str, head_dim: int) -> int:
    """Bytes of one key, or value, of a head."""
    if kv == "q8":
        return head_dim + 2 * -(-head_dim // GROUP)
    return head_dim * (4 if kv == "f32" else 2)

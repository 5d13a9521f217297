"""The table of weight formats. What a format means in C++ is in `csrc/cpu/formats/formats.hpp`.

Quantised formats share a grid: 32 neighbouring columns of a row are a group with an fp16 scale, and each value is
scale * q with a whole number q. Names are GGUF's in lower case. This module imports neither NumPy nor native code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GROUP = 32  # columns that share a scale
SCALE_BYTES = 2
PANEL = 16  # output rows that are packed together


@dataclass(frozen=True)
class WeightFormat:
    """How weights are held in memory.

    Attributes:
        name: what recipes and pack files call it.
        bits: of a stored number.
        offset: quantised formats: added to q, so that stored numbers are unsigned; 0: not quantised.
        divisor: quantised formats: scale = max |x| / divisor and q = x / scale rounded half away from zero; or, if it
            is negative, scale = (x of largest magnitude) / divisor and q = x / scale rounded, at most offset - 1.
    """

    name: str
    bits: int
    offset: int = 0
    divisor: int = 0

    @property
    def quantised(self) -> bool:
        return self.offset != 0

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 weights of one row."""
        return GROUP * self.bits // 8 + (SCALE_BYTES if self.quantised else 0)

    @property
    def block(self) -> int:
        """Columns that packed matrices are padded to a multiple of."""
        return 2 * GROUP if self.quantised else GROUP

    @property
    def deviation(self) -> float:
        """Standard deviation of evenly spread stored numbers, for random weights."""
        return math.sqrt((4 * self.offset**2 - 1) / 12)


# From the most precise to the smallest.
FORMATS = {
    f.name: f
    for f in (
        WeightFormat("f32", bits=32),
        WeightFormat("bf16", bits=16),
        WeightFormat("q8_0", bits=8, offset=128, divisor=127),
        WeightFormat("q4_0", bits=4, offset=8, divisor=-8),
    )
}

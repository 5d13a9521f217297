"""The table of weight formats. What a format means in C++ is in `csrc/cpu/formats/formats.hpp`.

Quantised formats share a grid: 32 neighbouring columns of a row are a group with an fp16 scale, and each value is
scale * q with a whole number q. GGUF calls q8 Q8_0 and q4 Q4_0. This module imports neither NumPy nor native code.
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
        name: what users and pack files call it.
        summary: ends the sentence "weights in memory: f32 ...".
        bits: of a stored number.
        drafter: the format of a drafter beside a target of this one. A drafter is small, and its mistakes cost rounds,
            so it is never below q8.
        offset: quantised formats: added to q, so that stored numbers are unsigned; 0: not quantised.
        divisor: quantised formats: scale = max |x| / divisor and q = x / scale rounded half away from zero; or, if it
            is negative, scale = (x of largest magnitude) / divisor and q = x / scale rounded, at most offset - 1.
    """

    name: str
    summary: str
    bits: int
    drafter: str
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
        WeightFormat("f32", "as the reference", bits=32, drafter="f32"),
        WeightFormat("bf16", "as in the files", bits=16, drafter="bf16"),
        WeightFormat("q8", "in half of that", bits=8, drafter="q8", offset=128, divisor=127),
        WeightFormat("q4", "in a quarter", bits=4, drafter="q8", offset=8, divisor=-8),
    )
}
METAVAR = "|".join(FORMATS)

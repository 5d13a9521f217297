"""bfloat16 in NumPy, which has no such type: its bits are held as uint16."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """Bits of bfloat16, rounded to nearest, ties to even. x: any shape, finite."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    """Values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def embedding_factor(width: int, in_bf16: bool) -> float:
    """sqrt(width), which rows of an embedding are multiplied by.

    The reference rounds it to the type of the checkpoint's table, whatever the model runs in.
    """
    exact: float = width**0.5
    if not in_bf16:
        return exact
    mantissa, exponent = math.frexp(exact)  # not `to_bf16`: training traces this
    return math.ldexp(round(mantissa * 256), exponent - 8)

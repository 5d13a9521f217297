"""Weight formats as NumPy arithmetic: the reference that the native kernels are tested against.

Activations of a quantised matrix are quantised too, a row and group at a time: scale = max |x| / 127 in float32,
q = x / scale rounded to even. A group's products are then summed as integers, exactly.

The packed layout is described in `csrc/cpu/formats/formats.hpp`; `pack` builds the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.quant.formats import FORMATS, GROUP

PANEL = 16  # output rows that are packed together

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Quantised:
    """A quantised matrix: values = scales * q."""

    scales: NDArray[np.float16]  # [rows, groups]
    q: NDArray[np.int8]  # [rows, groups, 32], without offset


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """Bits of bfloat16, rounded to nearest, ties to even. x: any shape, finite."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    """Values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pad_columns(x: Floats) -> Floats:
    """x [rows, columns] with zero columns up to a multiple of 32."""
    return np.pad(np.asarray(x, np.float32), ((0, 0), (0, -x.shape[1] % GROUP)))


def quantise(x: Floats, fmt: str) -> Quantised:
    """Quantise weights [rows, columns] to the grid of a format."""
    groups = pad_columns(x).reshape(x.shape[0], -1, GROUP)
    offset, divisor = FORMATS[fmt].offset, FORMATS[fmt].divisor
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    scale = ((np.abs(extreme) if divisor > 0 else extreme) / np.float32(divisor)).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    scaled = groups * inverse[..., None]
    if divisor > 0:
        q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # half away from zero
    else:
        q = np.minimum(2 * offset - 1, np.trunc(scaled + np.float32(offset + 0.5))) - offset
    return Quantised(scale.astype(np.float16), q.astype(np.int8))


def dequantise(matrix: Quantised, columns: int) -> Floats:
    """Values [rows, columns] of a quantised matrix."""
    values = matrix.scales.astype(np.float32)[..., None] * matrix.q.astype(np.float32)
    return values.reshape(len(values), -1)[:, :columns]


def round_trip(x: Floats, fmt: str) -> Floats:
    """What a matrix [rows, columns] becomes when it is stored in a format."""
    if FORMATS[fmt].quantised:
        return dequantise(quantise(x, fmt), x.shape[1])
    return from_bf16(to_bf16(x)) if fmt == "bf16" else np.asarray(x, np.float32)


def quantise_activations(x: Floats) -> tuple[Floats, NDArray[np.int8]]:
    """Scales [rows, groups] and q [rows, groups, 32] of activations x [rows, columns]."""
    groups = pad_columns(x).reshape(x.shape[0], -1, GROUP)
    top = np.abs(groups).max(-1)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > np.float32(1e-30))
    return (top / np.float32(127)).astype(np.float32), np.rint(groups * inverse[..., None]).astype(np.int8)


def matmul(weights: Floats, x: Floats, fmt: str) -> NDArray[np.float64]:
    """x [rows, columns] times weights [outputs, columns] transposed, as the format's kernels define it.

    Integer sums within a group are exact; everything else is float64, so kernels differ from it by rounding only.
    """
    if FORMATS[fmt].quantised:
        w = quantise(weights, fmt)
        scales, q = quantise_activations(x)
        sums = np.einsum("rgi,ogi->rog", q.astype(np.int64), w.q.astype(np.int64)).astype(np.float64)
        result: NDArray[np.float64] = np.einsum("rog,rg,og->ro", sums, scales.astype(float), w.scales.astype(float))
        return result
    if fmt == "bf16":
        x = from_bf16(to_bf16(x))
    return np.asarray(x.astype(np.float64) @ round_trip(weights, fmt).astype(np.float64).T)


def pack(weights: Floats, fmt: str) -> bytes:
    """The packed bytes of a matrix [outputs, columns]: panels of 16 outputs, see `csrc/cpu/formats/formats.hpp`."""
    rows, columns = weights.shape
    padded = np.zeros((rows + -rows % PANEL, columns + -columns % FORMATS[fmt].block), np.float32)
    padded[:rows, :columns] = weights
    panels = []
    for first in range(0, len(padded), PANEL):
        panel = padded[first : first + PANEL]
        if FORMATS[fmt].quantised:
            panels.append(_pack_quantised(quantise(panel, fmt), fmt, min(PANEL, rows - first)))
        else:
            stored = to_bf16(panel) if fmt == "bf16" else panel
            panels.append(stored.reshape(PANEL, -1, 4 // stored.itemsize).transpose(1, 0, 2).tobytes())
    return b"".join(panels)


def _pack_quantised(panel: Quantised, fmt: str, used: int) -> bytes:
    """Blocks of two groups, scales first. Lanes from `used` on belong to no row and are zero bytes."""
    scales = panel.scales.copy()  # [16, groups]
    unsigned = (panel.q.astype(np.int16) + FORMATS[fmt].offset).astype(np.uint8)  # [16, groups, 32]
    scales[used:], unsigned[used:] = 0, 0
    lanes = unsigned.reshape(PANEL, -1, 4)  # fours of k
    packed = lanes if FORMATS[fmt].bits == 8 else np.bitwise_or(lanes[:, ::2], np.left_shift(lanes[:, 1::2], 4))
    blocks = scales.shape[1] // 2
    front = scales.T.reshape(blocks, -1).view(np.uint8)  # [blocks, 2 x 16 x 2 bytes]
    data = packed.transpose(1, 0, 2).reshape(blocks, -1)  # [blocks, fours or eights x 16 x 4 bytes]
    return np.concatenate([front, data], axis=1).tobytes()

"""Error-compensated rounding of a matrix for the activations that it meets.

Rounding a column of weights leaves an error in the products. What of it the columns not yet rounded can make up for is
moved into them: columns are rounded from left to right, each after all errors before it [GPTQ, arXiv:2210.17323].
Scales and minima are searched for the moved weights, super-block after super-block, with the activations' mean squares
as importance of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.quant.bf16 import Floats

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.uint8]

DAMPING = 0.02  # of the mean square of all activations, added to each column's: few tokens say little of correlations


@dataclass(frozen=True)
class Grid:
    """Numbers of a GGUF type: a value is scale * q + minimum of its part, q = 0 .. top, and how they lie in a block.

    Attributes:
        part: columns that share scale and minimum.
        top: the largest number.
        offset: subtracted from q.
    """

    columns: int
    bytes: int
    part: int
    top: int
    offset: int = 0


GRIDS = {
    "Q4_0": Grid(32, 18, 32, 15, 8),
    "Q4_K": Grid(256, 144, 32, 15),
    "Q5_K": Grid(256, 176, 32, 31),
    "Q6_K": Grid(256, 210, 16, 63, 32),
}


def _halves(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _six_bits(s: Bytes) -> tuple[Bytes, Bytes]:
    """Factors [..., 8] of scales and minima of Q4_K and Q5_K from their twelve bytes."""
    first, second, third = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return scales, minima


def scales_of(blocks: Bytes, type: str) -> tuple[Floats, Floats]:
    """Scales and minima [rows, parts] of blocks [rows, bytes of a row]: a value is scale * q + minimum."""
    grid = GRIDS[type]
    b = blocks.reshape(len(blocks), -1, grid.bytes)
    if type == "Q4_0":
        scale = _halves(b, 0)
        return scale.reshape(len(b), -1), (scale * -grid.offset).reshape(len(b), -1)
    if type == "Q6_K":
        scale = _halves(b, 208) * np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
        return scale.reshape(len(b), -1), (scale * -grid.offset).reshape(len(b), -1)
    scales, minima = _six_bits(b[..., 4:16])
    return (_halves(b, 0) * scales).reshape(len(b), -1), (-_halves(b, 2) * minima).reshape(len(b), -1)


def with_numbers(blocks: Bytes, type: str, q: Numbers) -> Bytes:
    """The blocks with other numbers q [rows, columns]; scales and minima stay."""
    grid = GRIDS[type]
    b = blocks.reshape(len(blocks), -1, grid.bytes).copy()
    q = q.reshape(len(b), b.shape[1], -1, 32)  # [rows, blocks, groups, 32]
    if type == "Q4_0":
        b[..., 2:] = q[..., 0, :16] | q[..., 0, 16:] << 4
    elif type == "Q6_K":
        for h in range(2):
            g = q[:, :, 4 * h : 4 * h + 4]
            b[..., 64 * h : 64 * h + 32] = (g[..., 0, :] & 15) | (g[..., 2, :] & 15) << 4
            b[..., 64 * h + 32 : 64 * h + 64] = (g[..., 1, :] & 15) | (g[..., 3, :] & 15) << 4
            b[..., 128 + 32 * h : 160 + 32 * h] = sum((g[..., j, :] >> 4) << 2 * j for j in range(4))
    else:
        first = 48 if type == "Q5_K" else 16
        low = q & 15
        b[..., first:] = (low[:, :, 0::2] | low[:, :, 1::2] << 4).reshape(*b.shape[:2], 128)
        if type == "Q5_K":
            b[..., 16:48] = sum((q[:, :, g] >> 4) << g for g in range(8))
    return b.reshape(blocks.shape)


def inverse_factor(moments: NDArray[np.float64]) -> Floats:
    """The upper Cholesky factor of the inverse of the activations' second moments [columns, columns], damped."""
    damped = moments + np.eye(len(moments)) * (DAMPING * np.trace(moments) / len(moments) + 1e-30)
    lower = np.linalg.cholesky(np.linalg.inv(damped))
    return np.ascontiguousarray(lower.T, np.float32)


def importance_of(moments: NDArray[np.float64]) -> Floats:
    """What `_cpu.quantise` takes: mean squares of columns relative to their mean, none zero."""
    squares = np.diagonal(moments)
    relative: Floats = (squares / max(float(squares.mean()), 1e-30) + 1e-3).astype(np.float32)
    return relative


def round_compensated(weights: Floats, type: str, moments: NDArray[np.float64]) -> Bytes:
    """Blocks of a matrix whose products with such activations are as near as can be to those of its weights.

    Args:
        weights: [rows, columns], in whole blocks of the type; rows are independent of each other.
        type: one of GRIDS.
        moments: [columns, columns], the sum of x x^T over activations x that the matrix is multiplied with.
    """
    grid = GRIDS[type]
    factor, importance = inverse_factor(moments), importance_of(moments)
    w = np.array(weights.T, np.float32, order="C")  # a column of weights at a time is worked on: side by side
    blocks = np.empty((w.shape[1], len(w) // grid.columns * grid.bytes), np.uint8)
    for first in range(0, len(w), grid.columns):
        last = first + grid.columns
        found = _cpu.quantise(np.ascontiguousarray(w[first:last].T), type, importance[first:last])
        q, missed = _round_columns(w[first:last], found, type, factor[first:last, first:last])
        blocks[:, first // grid.columns * grid.bytes : last // grid.columns * grid.bytes] = with_numbers(found, type, q)
        w[last:] -= factor[first:last, last:].T @ missed
    return blocks


def _round_columns(w: Floats, found: Bytes, type: str, factor: Floats) -> tuple[Numbers, Floats]:
    """Round the columns of one block, whose weights are changed on the way.

    Args:
        w: [columns, rows].
        found: the block, for its scales and minima.
        factor: [columns, columns], the part of the inverse's factor for these columns.

    Returns:
        Numbers [rows, columns], and what is missed [columns, rows], to be moved into the columns after the block.
    """
    grid = GRIDS[type]
    scales, minima = (np.ascontiguousarray(x.T) for x in scales_of(found, type))
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    q, missed = np.empty(w.shape, np.uint8), np.empty(w.shape, np.float32)
    for start in range(0, grid.columns, grid.part):
        part, stop = start // grid.part, start + grid.part
        for k in range(start, stop):
            number = np.clip(np.rint((w[k] - minima[part]) * inverse[part]), 0, grid.top)
            q[k] = number
            missed[k] = (w[k] - (scales[part] * number + minima[part])) / factor[k, k]
            w[k + 1 : stop] -= np.outer(factor[k, k + 1 : stop], missed[k])
        w[stop:] -= factor[start:stop, stop:].T @ missed[start:stop]
    return np.ascontiguousarray(q.T), missed

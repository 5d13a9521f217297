"""Weight matrices: plain, or on the grids of GGUF's Q8_0 and Q4_0, in a layout that GPU kernels load in one run.

A quantised matrix [N, K] is stored by blocks of 64 columns, all rows of a block together, so that a tile of rows is one
stretch of memory: `values` [K / 64, N, bytes of a block], and `scales` [K / 64, N, 2] float16, one for each 32 columns.
In four-bit formats byte j holds columns j (low half) and j + 32 (high half) of its block, with the format's offset
added; in the others a column is a signed byte.

Such a matrix is made of GGUF's blocks by moving their bits, whether a file held them or the native quantiser made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from paceline import _cpu
from paceline.checkpoint.tensors import BLOCKS
from paceline.quant.bf16 import from_bf16
from paceline.quant.formats import GROUP

BLOCK = 2 * GROUP  # columns
PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16}


class Grid(NamedTuple):
    """Values scale * q of 32 columns with an fp16 scale; q + offset are unsigned numbers of `bits` bits."""

    bits: int
    offset: int


GRIDS = {"q8_0": Grid(8, 128), "q4_0": Grid(4, 8)}
FORMATS = (*PLAIN, *GRIDS)  # from the widest

# Types of blocks of 32 columns with an fp16 scale and nothing else, and the smallest format that holds them exactly.
EXACT = {"Q8_0": "q8_0", "Q5_0": "q8_0", "IQ4_NL": "q8_0", "Q4_0": "q4_0"}
OFFSETS = {"Q5_0": 16, "Q4_0": 8}  # what is added to numbers in blocks
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def check_format(fmt: str) -> None:
    """Raises ValueError unless matrices can be of this format."""
    if fmt not in FORMATS:
        raise ValueError(f"no {fmt} matrices in PyTorch; it has {', '.join(FORMATS)}")


def stored_bits(fmt: str) -> int:
    """Bits of a stored number of a quantised format: 4 or 8; 0 for plain formats."""
    return GRIDS[fmt].bits if fmt in GRIDS else 0


def plain_format(fmt: str) -> str:
    """The format of activations beside such weights, and of matrices that are never quantised."""
    return "f32" if fmt == "f32" else "bf16"


def widest(formats: Iterable[str]) -> str:
    """The one of several formats that loses least; of grids, each holds all values of the next exactly."""
    return min(formats, key=FORMATS.index)


class Matrix(NamedTuple):
    """A weight matrix [N, K] of some format; the module's docstring has the layouts."""

    values: Tensor
    scales: Tensor | None  # None for plain formats, whose values are [N, K]
    fmt: str

    @property
    def outputs(self) -> int:
        """N"""
        return self.values.shape[0 if self.scales is None else 1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def put(self, first: int, part: Matrix) -> None:
        """Replace the rows from `first` on by those of a matrix of the same format."""
        rows = slice(first, first + part.outputs)
        if self.scales is None or part.scales is None:
            self.values[rows] = part.values
        else:
            self.values[:, rows], self.scales[:, rows] = part.values, part.scales

    def rows(self, numbers: Tensor, columns: int) -> Tensor:
        """Rows [n] of the matrix: [n, columns], in float32 if it is quantised, else in its dtype."""
        if self.scales is None:
            return F.embedding(numbers, self.values)
        return dequantise(self.values[:, numbers], self.scales[:, numbers], self.fmt)[:, :columns]


def pack(rows: NDArray[Any], fmt: str, element: str = "", device: torch.device | None = None) -> Matrix:
    """Rows of a checkpoint's tensor in a format.

    Args:
        rows: float32, float16 or uint16 (the bits of bfloat16) [N, K]; or uint8 [N, bytes of a row], GGUF's blocks.
        fmt: one of `FORMATS`.
        element: the type of the blocks. Those that the format holds exactly keep their bits; others are dequantised,
            and rounded or quantised again as the format calls for.
        device: where they go; None: they stay on the processor.
    """
    check_format(fmt)
    if fmt in PLAIN:
        values = torch.from_numpy(_floats(rows, element) if element else rows).to(device)
        values = values.view(torch.bfloat16) if rows.dtype == np.uint16 else values
        return Matrix(values.to(PLAIN[fmt]).contiguous(), None, fmt)
    if element not in EXACT or widest((fmt, EXACT[element])) != fmt:
        rows, element = _quantised(_floats(rows, element), fmt.upper()), fmt.upper()
    return _from_blocks(torch.from_numpy(rows).to(device), element, fmt)


def empty(rows: int, columns: int, fmt: str, device: torch.device) -> Matrix:
    """A matrix to be filled by `put`."""
    check_format(fmt)
    if fmt in PLAIN:
        return Matrix(torch.empty((rows, columns), dtype=PLAIN[fmt], device=device), None, fmt)
    blocks, kind = -(-columns // BLOCK), torch.uint8 if stored_bits(fmt) == 4 else torch.int8
    values = torch.empty((blocks, rows, BLOCK * stored_bits(fmt) // 8), dtype=kind, device=device)
    return Matrix(values, torch.empty((blocks, rows, 2), dtype=torch.float16, device=device), fmt)


def random(rows: int, columns: int, fmt: str, device: torch.device) -> Matrix:
    """A random matrix whose products keep the variance of what they are multiplied with."""
    check_format(fmt)
    if fmt in PLAIN:
        values = torch.empty((rows, columns), dtype=PLAIN[fmt], device=device)
        return Matrix(values.normal_(std=columns**-0.5), None, fmt)
    blocks, offset = -(-columns // BLOCK), GRIDS[fmt].offset
    values = torch.randint(-offset, offset, (rows, blocks * BLOCK), dtype=torch.int8, device=device)
    scale = columns**-0.5 / math.sqrt((4 * offset**2 - 1) / 12)  # the deviation of evenly spread q
    return Matrix(_stored(values, fmt), torch.full((blocks, rows, 2), scale, dtype=torch.float16, device=device), fmt)


def dequantise(values: Tensor, scales: Tensor, fmt: str) -> Tensor:
    """Quantised values of n rows, [K / 64, n, bytes of a block], as float32 [n, K]."""
    if stored_bits(fmt) == 4:
        values = torch.cat((values & 15, values >> 4), dim=-1).to(torch.int8) - GRIDS[fmt].offset
    x = values.float().view(*scales.shape, GROUP) * scales.float()[..., None]  # [K / 64, n, 2, 32]
    return x.transpose(0, 1).flatten(1)


def _floats(rows: NDArray[Any], element: str) -> NDArray[np.float32]:
    """The exact values [N, K] of rows as `pack` takes them."""
    if element:
        width, size = BLOCKS[element]
        return _in_threads(lambda part: _cpu.dequantise(part, element, rows.shape[1] // size * width), rows)
    return from_bf16(rows) if rows.dtype == np.uint16 else rows.astype(np.float32, copy=False)


def _quantised(x: NDArray[np.float32], element: str) -> NDArray[np.uint8]:
    """Blocks of rows [N, K], which end in zeros if they are no whole blocks."""
    padded = np.ascontiguousarray(np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))))
    return _in_threads(lambda part: _cpu.quantise(part, element), padded)


def _in_threads(work: Callable[[NDArray[Any]], NDArray[Any]], rows: NDArray[Any]) -> NDArray[Any]:
    """What native code, which leaves the GIL to others, makes of rows."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(work, np.array_split(rows, min(threads, len(rows))))))


def _from_blocks(rows: Tensor, element: str, fmt: str) -> Matrix:
    """Rows of blocks [N, bytes of a row] in a format that holds them exactly."""
    blocks = rows.view(len(rows), -1, BLOCKS[element][1])
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]  # [N, K / 32]
    padding = scales.shape[1] % 2  # blocks here are two of GGUF's
    q = F.pad(_numbers(blocks, element), (0, 0, 0, padding)).flatten(1)
    scales = F.pad(scales, (0, padding)).view(len(rows), -1, 2)
    return Matrix(_stored(q, fmt), scales.transpose(0, 1).contiguous(), fmt)


def _numbers(blocks: Tensor, element: str) -> Tensor:
    """What the scale multiplies in blocks [N, K / 32, bytes], a type of `EXACT`: int8 [N, K / 32, 32]."""
    if element == "Q8_0":
        return blocks[..., 2:].view(torch.int8)
    halves = blocks[..., -16:]
    q = torch.cat((halves & 15, halves >> 4), dim=-1)
    if element == "IQ4_NL":
        return torch.tensor(IQ4_VALUES, dtype=torch.int8, device=q.device)[q.int()]
    if element == "Q5_0":  # the fifth bits of all columns come before
        bits = torch.arange(8, dtype=torch.uint8, device=q.device)
        q = q | (blocks[..., 2:6, None] >> bits & 1).flatten(-2) << 4
    return q.view(torch.int8) - OFFSETS[element]


def _stored(q: Tensor, fmt: str) -> Tensor:
    """Whole numbers [n, K] in the layout of `values`."""
    blocks = q.view(len(q), -1, BLOCK)
    if stored_bits(fmt) == 4:
        low, high = (blocks + GRIDS[fmt].offset).to(torch.uint8).chunk(2, dim=-1)
        blocks = low | high << 4
    return blocks.transpose(0, 1).contiguous()

"""Weight matrices: plain, or on the grids of `quant.blocks` in a layout that GPU kernels load in one run.

A quantised matrix [N, K] is stored by blocks of 64 columns, all rows of a block together, so that a tile of rows is one
stretch of memory: `values` [K / 64, N, block bytes], and `scales` [K / 64, N, 2] float16, one for each 32 columns. In
q8 a byte is a column; in q4 byte j holds columns j (low half) and j + 32 (high half) of its block, with 8 added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
GROUP = 32
SLICE = 1 << 14  # rows quantised at once, which bounds the memory it takes


@dataclass(frozen=True)
class Format:
    """How the values of a matrix are held."""

    dtype: torch.dtype
    bits: int = 0  # of a quantised weight; 0 for plain formats
    deviation: float = 1.0  # of evenly distributed quantised weights

    @property
    def block_bytes(self) -> int:
        return BLOCK * self.bits // 8


FORMATS = {
    "f32": Format(torch.float32),
    "bf16": Format(torch.bfloat16),
    "q8": Format(torch.int8, 8, 74.0),
    "q4": Format(torch.uint8, 4, 4.6),
}


def plain_format(fmt: str) -> str:
    """The format of activations beside such weights, and of matrices that are never quantised."""
    return "f32" if fmt == "f32" else "bf16"


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

    def rows(self, numbers: Tensor, columns: int) -> Tensor:
        """Rows [n] of the matrix: [n, columns], in float32 if it is quantised, else in its dtype."""
        if self.scales is None:
            return F.embedding(numbers, self.values)
        return dequantise(self.values[:, numbers], self.scales[:, numbers], self.fmt)[:, :columns]


def pack(weights: Tensor, fmt: str) -> Matrix:
    """Weights [N, K] in a format."""
    if not FORMATS[fmt].bits:
        return Matrix(weights.to(FORMATS[fmt].dtype).contiguous(), None, fmt)
    parts = [_quantise(part, fmt) for part in torch.split(weights, SLICE)]
    values, scales = (torch.cat(kind, dim=1) for kind in zip(*parts, strict=True))
    return Matrix(values, scales, fmt)


def stack(matrices: Iterable[Matrix]) -> Matrix:
    """One matrix with the outputs of several, which must be of one format."""
    parts = list(matrices)
    (fmt,) = {part.fmt for part in parts}
    if len(parts) == 1:
        return parts[0]
    scales = [part.scales for part in parts if part.scales is not None]
    values = torch.cat([part.values for part in parts], dim=1 if scales else 0)
    return Matrix(values, torch.cat(scales, dim=1) if scales else None, fmt)


def random(rows: int, columns: int, fmt: str, device: torch.device) -> Matrix:
    """A random matrix whose products keep the variance of what they are multiplied with."""
    record = FORMATS[fmt]
    if not record.bits:
        values = torch.empty((rows, columns), dtype=record.dtype, device=device)
        return Matrix(values.normal_(std=columns**-0.5), None, fmt)
    blocks = -(-columns // BLOCK)
    values = torch.randint(-128, 128, (blocks, rows, record.block_bytes), dtype=torch.int8, device=device)
    scale = columns**-0.5 / record.deviation
    scales = torch.full((blocks, rows, 2), scale, dtype=torch.float16, device=device)
    return Matrix(values.view(record.dtype), scales, fmt)


def dequantise(values: Tensor, scales: Tensor, fmt: str) -> Tensor:
    """Quantised values of n rows, [K / 64, n, block bytes], as float32 [n, K]."""
    q = torch.cat((values & 15, values >> 4), dim=-1).float() - 8 if fmt == "q4" else values.float()
    x = q.view(*scales.shape, GROUP) * scales.float()[..., None]  # [K / 64, n, 2, 32]
    return x.transpose(0, 1).flatten(1)


def _quantise(weights: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """The grid of `quant.blocks.quantise`, bit for bit."""
    x = F.pad(weights.float(), (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, GROUP)  # [n, groups, 32]
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
    scale = largest.abs() / 127 if fmt == "q8" else largest / -8
    scaled = x * torch.where(scale == 0, 0.0, 1 / scale)[..., None]
    scales = scale.half().view(len(x), -1, 2).transpose(0, 1).contiguous()
    if fmt == "q8":
        q = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled)).to(torch.int8)
        return q.view(len(x), -1, BLOCK).transpose(0, 1).contiguous(), scales
    q = torch.trunc(scaled + 8.5).clamp(max=15).to(torch.uint8).view(len(x), -1, 2, GROUP)
    return (q[:, :, 0] | q[:, :, 1] << 4).transpose(0, 1).contiguous(), scales

"""Weight matrices: plain, or on the grids of GGUF's Q8_0 and Q4_0, in a layout that GPU kernels load in one run.

A quantised matrix [N, K] is stored by blocks of 64 columns, all rows of a block together, so that a tile of rows is one
stretch of memory: `values` [K / 64, N, bytes of a block], and `scales` [K / 64, N, 2] float16, one for each 32 columns.
In four-bit formats byte j holds columns j (low half) and j + 32 (high half) of its block, with the format's offset
added; in the others a column is a signed byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.quant.formats import GROUP

BLOCK = 2 * GROUP  # columns
SLICE = 1 << 14  # rows quantised at once, which bounds the memory it takes
PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16}


class Grid(NamedTuple):
    """Values scale * q of 32 columns with an fp16 scale; q + offset are unsigned numbers of `bits` bits.

    scale = max |x| / divisor and q = x / scale rounded half away from zero; or, if the divisor is negative,
    scale = (x of largest magnitude) / divisor and q = x / scale rounded, at most offset - 1.
    """

    bits: int
    offset: int
    divisor: int


GRIDS = {"q8_0": Grid(8, 128, 127), "q4_0": Grid(4, 8, -8)}
FORMATS = (*PLAIN, *GRIDS)


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
    check_format(fmt)
    if fmt in PLAIN:
        return Matrix(weights.to(PLAIN[fmt]).contiguous(), None, fmt)
    parts = [_quantise(part, fmt) for part in torch.split(weights, SLICE)]
    values, scales = (torch.cat(kind, dim=1) for kind in zip(*parts, strict=True))
    return Matrix(values, scales, fmt)


def stack(matrices: Iterable[Matrix]) -> Matrix:
    """One matrix with the outputs of several, which must be of one format."""
    parts = list(matrices)
    formats = {part.fmt for part in parts}
    if len(formats) > 1:
        raise ValueError(f"matrices of different formats in one: {', '.join(sorted(formats))}")
    if len(parts) == 1:
        return parts[0]
    scales = [part.scales for part in parts if part.scales is not None]
    values = torch.cat([part.values for part in parts], dim=1 if scales else 0)
    return Matrix(values, torch.cat(scales, dim=1) if scales else None, parts[0].fmt)


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


def _quantise(weights: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """The grid of the NumPy reference in the tests, bit for bit: stored values and scales of weights [n, K]."""
    _, offset, divisor = GRIDS[fmt]
    x = F.pad(weights.float(), (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, GROUP)  # [n, groups, 32]
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
    scale = (extreme.abs() if divisor > 0 else extreme) / divisor
    scaled = x * torch.where(scale == 0, 0.0, 1 / scale)[..., None]
    if divisor > 0:
        q = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled))  # half away from zero
    else:
        q = torch.trunc(scaled + (offset + 0.5)).clamp(max=2 * offset - 1) - offset
    return _stored(q.to(torch.int8).flatten(1), fmt), scale.half().view(len(x), -1, 2).transpose(0, 1).contiguous()


def _stored(q: Tensor, fmt: str) -> Tensor:
    """Whole numbers [n, K] in the layout of `values`."""
    blocks = q.view(len(q), -1, BLOCK)
    if stored_bits(fmt) == 4:
        low, high = (blocks + GRIDS[fmt].offset).to(torch.uint8).chunk(2, dim=-1)
        blocks = low | high << 4
    return blocks.transpose(0, 1).contiguous()

"""Weight matrices on a device: plain, or on the grids of `quant.blocks` in a layout that the kernels read in one run.

A quantised matrix [N, K] is stored by blocks of 64 columns, all rows of a block together, so that a tile of rows is one
stretch of memory: `values` [K / 64, N, 64] int8 for q8; [K / 64, N, 32] uint8 for q4, byte j holding columns j (low
half) and j + 32 (high half) of its block with 8 added; `scales` [K / 64, N, 2] float16, one for each 32 columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
GROUP = 32
SLICE = 1 << 14  # rows quantised at once, which bounds the memory it takes

FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8, "q4": torch.uint8}


def plain_format(fmt: str) -> str:
    """The format of activations, and of what is never quantised."""
    return "f32" if fmt == "f32" else "bf16"


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of some format; see above for the layouts."""

    values: Tensor
    scales: Tensor | None  # None for f32 and bf16, whose values are [N, K]
    outputs: int  # N
    columns: int  # K

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows [n] of the matrix: [n, K] in float32 if it is quantised, else in its own type."""
        if self.scales is None:
            return self.values[numbers]
        return dequantise(self.values[:, numbers], self.scales[:, numbers])[:, : self.columns]


def pack(weights: Tensor, fmt: str) -> Matrix:
    """Weights [N, K] in a format."""
    rows, columns = weights.shape
    if fmt not in ("q8", "q4"):
        return Matrix(weights.to(FORMATS[fmt]).contiguous(), None, rows, columns)
    parts = [_quantise(part, fmt) for part in torch.split(weights, SLICE)]
    values, scales = (torch.cat(kind, dim=1) for kind in zip(*parts, strict=True))
    return Matrix(values, scales, rows, columns)


def stack(matrices: Iterable[Matrix]) -> Matrix:
    """One matrix with the outputs of several."""
    parts = list(matrices)
    if len(parts) == 1:
        return parts[0]
    scales = [part.scales for part in parts if part.scales is not None]
    return Matrix(
        torch.cat([part.values for part in parts], dim=1 if scales else 0),
        torch.cat(scales, dim=1) if scales else None,
        sum(part.outputs for part in parts),
        parts[0].columns,
    )


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """Quantised values of n rows, [K / 64, n, 64 or 32], as float32 [n, K]."""
    halves = (
        torch.cat((values & 15, values >> 4), dim=-1).float() - 8 if values.dtype == torch.uint8 else values.float()
    )
    x = halves.view(*scales.shape, GROUP) * scales.float()[..., None]  # [K / 64, n, 2, 32]
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

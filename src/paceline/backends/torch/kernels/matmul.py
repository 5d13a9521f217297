"""Matrix products of a few rows with weights of any format: memory-bound, so every weight is read once.

A program takes 16 rows and a strip of outputs and walks along the columns. A product of more rows is more programs over
the same strips, next to each other in time, so that the weights come from the cache; each row is summed as if alone.
Quantised weights enter the matrix units as small whole numbers, which bfloat16 holds exactly; their scales, one for
each 32 columns, multiply the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.backends.torch.kernels.common import FUSED, INTERPRETED, TILE, capped, gelu, product, whole
from paceline.models.matrix import Matrix, stored_bits

_TILE = tl.constexpr(TILE)


@triton.jit
def strip(
    x, row, rows, weights, scales, n, total, K,
    BITS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums [16, N], float32, of rows `row`... of x [rows, K] with outputs n [N] of a matrix of `total` outputs."""
    m = row + tl.arange(0, _TILE)
    real = m < rows
    acc = tl.zeros((_TILE, N), tl.float32)
    safe = tl.minimum(n, total - 1).to(tl.int64)
    if BITS == 0:
        for start in tl.range(0, K, BLOCK, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK)
            a = tl.load(x + m[:, None] * K + k[None], mask=real[:, None] & (k < K)[None], other=0.0)
            b = tl.load(weights + safe[:, None] * K + k[None], mask=(k < K)[None], other=0.0)
            acc = product(a, tl.trans(b), acc)
    else:
        for start in tl.range(0, K, BLOCK, num_stages=STAGES):
            for part in tl.static_range(BLOCK // 64):
                acc = add_block(x, m, real, weights, scales, safe, total, K, start + part * 64, acc, BITS, N)
    return acc


# Four bytes $4 to their low halves less 8, in $0 and $1, and their high halves less 8, in $2 and $3, two bfloat16 a
# word: 0x4300 is 128, and its last four bits count ones.
HALVES = """{
    .reg .b32 pair, next, one, offset;
    mov.b32 one, 0x3f803f80;
    mov.b32 offset, 0xc308c308;
    prmt.b32 pair, $4, 0, 0x4140;
    prmt.b32 next, $4, 0, 0x4342;
    lop3.b32 $0, pair, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, next, 0x000f000f, 0x43004300, 0xea;
    shr.b32 pair, pair, 4;
    shr.b32 next, next, 4;
    lop3.b32 $2, pair, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $3, next, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, $0, one, offset;
    fma.rn.bf16x2 $1, $1, one, offset;
    fma.rn.bf16x2 $2, $2, one, offset;
    fma.rn.bf16x2 $3, $3, one, offset;
}"""
_HALVES = tl.constexpr(HALVES)


@triton.jit
def halves(both):
    """The low and the high halves of bytes less 8, as bfloat16: twelve instructions for eight weights."""
    if INTERPRETED:
        return whole((both & 15).to(tl.int8) - 8), whole((both >> 4).to(tl.int8) - 8)
    return tl.inline_asm_elementwise(
        _HALVES, "=r,=r,=r,=r,r", [both], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )


@triton.jit
def add_block(x, m, real, weights, scales, n, total, K, start, acc, BITS: tl.constexpr, N: tl.constexpr):
    """acc and the sums over 64 columns of a quantised matrix; columns from K on count as zeros."""
    k = start + tl.arange(0, 32)
    low = tl.load(x + m[:, None] * K + k[None], mask=real[:, None] & (k < K)[None], other=0.0)
    high = tl.load(x + m[:, None] * K + k[None] + 32, mask=real[:, None] & (k + 32 < K)[None], other=0.0)
    columns = tl.zeros_like(n) + start
    at = columns // 64 * total + n
    there = columns < K
    g = tl.arange(0, 32)
    if BITS == 4:
        both = tl.load(weights + at[:, None] * 32 + g[None], mask=there[:, None], other=0)
        first, second = halves(both)
    else:
        first = whole(tl.load(weights + at[:, None] * 64 + g[None], mask=there[:, None], other=0))
        second = whole(tl.load(weights + at[:, None] * 64 + 32 + g[None], mask=there[:, None], other=0))
    pair = tl.load(scales + at, mask=there, other=0)  # two float16
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    none = tl.zeros((_TILE, N), tl.float32)
    acc += product(low, tl.trans(first.to(low.dtype)), none) * scale[None]
    scale = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return acc + product(high, tl.trans(second.to(high.dtype)), none) * scale[None]


@triton.jit
def matmul_kernel(
    x, weights, scales, out, rows, outputs, K, cap, CAPPED: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [rows, K] times a matrix transposed; programs (16 rows, N outputs)."""
    row = tl.program_id(0) * _TILE
    n = tl.program_id(1) * N + tl.arange(0, N)
    acc = strip(x, row, rows, weights, scales, n, outputs, K, BITS, N, BLOCK, STAGES)
    if CAPPED:
        acc = capped(acc, cap)
    m = row + tl.arange(0, _TILE)
    at = m.to(tl.int64)[:, None] * outputs + n[None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None])


@triton.jit
def gate_kernel(
    x, chosen, weights, scales, out, rows, width, K, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, CHOICES: tl.constexpr,
    BITS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gelu(gate) * up of an expert that some row has chosen: out [experts, rows, width]; programs also by expert.

    With no choice (CHOICES is 0) there is one expert, which all rows take.
    """
    row, expert = tl.program_id(0) * _TILE, tl.program_id(2)
    if CHOICES == 0 or hit(chosen, row, rows, expert, ACTIVE, CHOICES):
        n = tl.program_id(1) * N + tl.arange(0, N)
        inside = tl.minimum(n, width - 1)
        first, total = expert * 2 * width, EXPERTS * 2 * width
        gate = strip(x, row, rows, weights, scales, first + inside, total, K, BITS, N, BLOCK, STAGES)
        up = strip(x, row, rows, weights, scales, first + width + inside, total, K, BITS, N, BLOCK, STAGES)
        kind = out.dtype.element_ty
        value = gelu(gate.to(kind).to(tl.float32)).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
        m = row + tl.arange(0, _TILE)
        at = (expert.to(tl.int64) * rows + m)[:, None] * width + n[None]
        tl.store(out + at, value.to(kind), mask=(m < rows)[:, None] & (n < width)[None])


@triton.jit
def down_kernel(
    x, chosen, weights, scales, out, rows, width, K, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, CHOICES: tl.constexpr,
    BITS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [experts, rows, K] through each expert that some row has chosen: out [experts, rows, width]."""
    row, expert = tl.program_id(0) * _TILE, tl.program_id(2)
    if hit(chosen, row, rows, expert, ACTIVE, CHOICES):
        n = tl.program_id(1) * N + tl.arange(0, N)
        mine = x + expert.to(tl.int64) * rows * K
        at = expert * width + tl.minimum(n, width - 1)
        acc = strip(mine, row, rows, weights, scales, at, EXPERTS * width, K, BITS, N, BLOCK, STAGES)
        m = row + tl.arange(0, _TILE)
        place = (expert.to(tl.int64) * rows + m)[:, None] * width + n[None]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < width)[None])


@triton.jit
def hit(chosen, row, rows, expert, ACTIVE: tl.constexpr, CHOICES: tl.constexpr):
    """Whether one of 16 rows has chosen an expert."""
    m, k = row + tl.arange(0, _TILE), tl.arange(0, CHOICES)
    inside = (m < rows)[:, None] & (k < ACTIVE)[None]
    picks = tl.load(chosen + m[:, None] * ACTIVE + k[None], mask=inside, other=-1)
    return tl.max(tl.max((picks == expert).to(tl.int32), 1), 0) > 0


@triton.jit
def mix_kernel(parts, weights, chosen, out, rows, width, ACTIVE: tl.constexpr, BLOCK: tl.constexpr):
    """The chosen experts' parts [experts, rows, width] of each row, weighted and summed in the order of its choices."""
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(ACTIVE):
        expert = tl.load(chosen + row * ACTIVE + k).to(tl.int64)
        part = tl.load(parts + (expert * rows + row) * width + n, mask=n < width, other=0.0).to(tl.float32)
        acc += part * tl.load(weights + row * ACTIVE + k)
    tl.store(out + row * width + n, acc.to(out.dtype.element_ty), mask=n < width)


def shape_of(outputs: int, bits: int, x: torch.dtype) -> dict[str, int]:
    """Sizes of a program's work, by the matrix alone: narrow strips where there are few outputs."""
    n = 16 if outputs <= 2048 else 32 if outputs <= 8192 else 64
    if bits:
        return {"N": max(32, n), "BLOCK": 1024 // bits, "STAGES": 4, "num_warps": 4, **FUSED}
    return {"N": n, "BLOCK": 8192 // n // (2 if x == torch.float32 else 1), "STAGES": 4, "num_warps": 4, **FUSED}


def pairs(scales: Tensor | None) -> Tensor | None:
    """Two scales in a word each, [K / 64, N], so that they can be loaded ahead."""
    return None if scales is None else scales.view(torch.int32)


def matmul(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str) -> Tensor:
    return _product(x, values, scales, fmt, x.dtype, 0.0)


def scores(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str, cap: float) -> Tensor:
    return _product(x, values, scales, fmt, torch.float32, cap)


def _product(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str, out: torch.dtype, cap: float) -> Tensor:
    rows, outputs, bits = len(x), Matrix(values, scales, fmt).outputs, stored_bits(fmt)
    result = torch.empty((rows, outputs), dtype=out, device=x.device)
    shape = shape_of(outputs, bits, x.dtype)
    matmul_kernel[(triton.cdiv(rows, TILE), triton.cdiv(outputs, shape["N"]))](
        x.contiguous(),
        values,
        pairs(scales),
        result,
        rows,
        outputs,
        x.shape[1],
        cap,
        CAPPED=cap > 0,
        BITS=bits,
        **shape,
    )
    return result


def gate_up(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str) -> Tensor:
    out = _gate(x, None, values, scales, fmt, 1)
    return out[0]


def experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_fmt: str,
    down: Tensor,
    down_scales: Tensor | None,
    down_fmt: str,
    count: int,
) -> Tensor:
    rows, hidden = x.shape
    activations = _gate(x, chosen, gate_up, gate_up_scales, gate_up_fmt, count)
    parts = torch.empty((count, rows, hidden), dtype=x.dtype, device=x.device)
    bits = stored_bits(down_fmt)
    shape = shape_of(hidden, bits, x.dtype)
    down_kernel[(triton.cdiv(rows, TILE), triton.cdiv(hidden, shape["N"]), count)](
        activations, chosen, down, pairs(down_scales), parts, rows, hidden, activations.shape[2], BITS=bits,
        **_choice(chosen, count), **shape,
    )  # fmt: skip
    out = torch.empty_like(x)
    mix_kernel[(rows, triton.cdiv(hidden, 1024))](
        parts, weights, chosen, out, rows, hidden, ACTIVE=chosen.shape[1], BLOCK=1024, **FUSED
    )
    return out


def _gate(x: Tensor, chosen: Tensor | None, values: Tensor, scales: Tensor | None, fmt: str, count: int) -> Tensor:
    """gelu(gate) * up of `count` experts: [count, M, N]."""
    rows, width, bits = len(x), Matrix(values, scales, fmt).outputs // count // 2, stored_bits(fmt)
    out = torch.empty((count, rows, width), dtype=x.dtype, device=x.device)
    shape = shape_of(width, bits, x.dtype)
    gate_kernel[(triton.cdiv(rows, TILE), triton.cdiv(width, shape["N"]), count)](
        x.contiguous(), chosen, values, pairs(scales), out, rows, width, x.shape[1], BITS=bits,
        **_choice(chosen, count), **shape,
    )  # fmt: skip
    return out


def _choice(chosen: Tensor | None, count: int) -> dict[str, int]:
    active = 0 if chosen is None else chosen.shape[1]
    return {"EXPERTS": count, "ACTIVE": active, "CHOICES": triton.next_power_of_2(active) if active else 0}

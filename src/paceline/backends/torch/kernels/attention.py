"""Attention over KV caches for a few rows: heads' norms and rotation, then splits of each slot's keys in parallel.

A program takes adjacent rows of one slot, the heads that share a K/V head, and one split of the slot's positions.
Splits begin at fixed positions, and positions that a row does not see count as exact zeros, so a row's sums do not
depend on the rows beside it. A second kernel combines a row's splits, as Flash-Decoding does (Dao et al., 2023,
https://pytorch.org/blog/flash-decoding/).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.backends.torch.kernels.common import FUSED, product

MOST_BYTES = 1 << 27  # bytes of splits before they are combined
AT_A_TIME = 16  # splits combined at a time


@triton.jit
def heads_kernel(
    x, query_norm, key_norm, cos, sin, queries, keys, values, slots, positions, ring, count, kv_heads, eps,
    STORES: tl.constexpr, HAS_VALUES: tl.constexpr, VALUE_NORM: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one row: normed, rotated, and stored where it belongs. Halves of SIZE / 2 in blocks of HALF."""
    row, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, HALF)
    inside = at < SIZE // 2
    stride = tl.num_programs(1) * SIZE
    source = x + row.to(tl.int64) * stride + head * SIZE + at
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / SIZE + eps)
    kind = queries.dtype.element_ty
    position, slot = tl.load(positions + row), tl.load(slots + row)
    place = ((slot * kv_heads + (head - count) % kv_heads) * ring + position % ring) * SIZE + at
    is_value = head >= count + kv_heads
    if STORES:  # noqa: SIM102
        if (position >= 0) & (is_value | ((head >= count) & (not HAS_VALUES))):
            factor = scale if VALUE_NORM else 1.0
            tl.store(values + place, (first * factor).to(kind), mask=inside)
            tl.store(values + place + SIZE // 2, (second * factor).to(kind), mask=inside)
    first, second = first * scale, second * scale
    if not is_value:
        weight = query_norm + at
        if STORES:  # noqa: SIM102
            if head >= count:
                weight = key_norm + at
        first = (first * tl.load(weight, mask=inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
        second = (second * tl.load(weight + SIZE // 2, mask=inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
        c = tl.load(cos + row * (SIZE // 2) + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + row * (SIZE // 2) + at, mask=inside, other=0.0).to(tl.float32)
        turned, other = (first * c - second * s).to(kind), (second * c + first * s).to(kind)
        if head < count:
            target = queries + (row.to(tl.int64) * count + head) * SIZE + at
            tl.store(target, turned, mask=inside)
            tl.store(target + SIZE // 2, other, mask=inside)
        elif STORES:  # noqa: SIM102
            if position >= 0:
                tl.store(keys + place, turned, mask=inside)
                tl.store(keys + place + SIZE // 2, other, mask=inside)


@triton.jit
def split_kernel(
    queries, keys, values, slots, positions, parts, tops, sums, ring, window, rows, kv_heads, splits,
    TOGETHER: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Unnormalised attention of up to TOGETHER adjacent rows x GROUP heads over one split of positions.

    parts [rows, heads, splits, SIZE], tops and sums [rows, heads, splits]; a row's splits count from its first.
    GROUP and WIDTH are SHARING heads and SIZE columns, padded to powers of two.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    before = tl.maximum(row - 1, 0)
    follows = (tl.load(slots + before) == slot) & (tl.load(positions + before) == position - 1)
    leads = (position >= 0) & ((row % TOGETHER == 0) | (not follows))
    if leads:
        i = tl.arange(0, TOGETHER * GROUP)
        r, h = row + i // GROUP, i % GROUP
        real = (r < rows) & (r < (row // TOGETHER + 1) * TOGETHER) & (h < SHARING)
        mine = tl.load(positions + r, mask=real, other=-1)
        real = real & (mine - position == r - row) & (tl.load(slots + r, mask=real, other=-1) == slot)
        last = tl.max(tl.where(real, mine, -1), 0)
        start = (tl.maximum(position - window + 1, 0) // SPLIT + split) * SPLIT
        if start <= last:
            c = tl.arange(0, WIDTH)
            heads = kv_heads * SHARING
            of_row = r.to(tl.int64) * heads + head * SHARING + h
            q = tl.load(queries + of_row[:, None] * SIZE + c[None], mask=real[:, None] & (c < SIZE)[None], other=0.0)
            top = tl.full((TOGETHER * GROUP,), float("-inf"), tl.float32)
            total = tl.zeros((TOGETHER * GROUP,), tl.float32)
            acc = tl.zeros((TOGETHER * GROUP, WIDTH), tl.float32)
            memory = (slot * kv_heads + head) * ring
            for b in range(0, SPLIT, BLOCK):
                p = start + b + tl.arange(0, BLOCK)
                at = (memory + p % ring)[:, None] * SIZE + c[None]
                there = ((p <= last) & (p > position - window))[:, None] & (c < SIZE)[None]
                k = tl.load(keys + at, mask=there, other=0.0)
                v = tl.load(values + at, mask=there, other=0.0)
                score = product(q, tl.trans(k), tl.zeros((TOGETHER * GROUP, BLOCK), tl.float32))
                seen = (p[None] <= mine[:, None]) & (p[None] > mine[:, None] - window)
                score = tl.where(seen, score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                base = tl.where(higher == float("-inf"), 0.0, higher)
                share = tl.exp(score - base[:, None])
                shrink = tl.exp(top - base)
                total = total * shrink + tl.sum(share, 1)
                acc = product(share.to(k.dtype), v, acc * shrink[:, None])
                top = higher
            first = tl.maximum(mine - window + 1, 0) // SPLIT
            number = start // SPLIT - first
            real = real & (number >= 0) & (start <= mine)
            place = of_row * splits + number
            tl.store(tops + place, top, mask=real)
            tl.store(sums + place, total, mask=real)
            tl.store(parts + place[:, None] * SIZE + c[None], acc, mask=real[:, None] & (c < SIZE)[None])


@triton.jit
def combine_kernel(
    parts, tops, sums, positions, out, window, splits,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A row's splits of one head combined: out [rows, heads, SIZE]; zeros for padding."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    first = tl.maximum(position - window + 1, 0) // SPLIT
    count = tl.where(position < 0, 0, position // SPLIT - first + 1).to(tl.int32)
    c, i = tl.arange(0, WIDTH), tl.arange(0, AT_ONCE)
    place = (row.to(tl.int64) * tl.num_programs(1) + head) * splits
    top = tl.full((AT_ONCE,), float("-inf"), tl.float32)
    for start in range(0, count, AT_ONCE):
        n = start + i
        top = tl.maximum(top, tl.load(tops + place + n, mask=n < count, other=float("-inf")))
    highest = tl.max(top, 0)
    total = tl.zeros((AT_ONCE,), tl.float32)
    acc = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, count, AT_ONCE):
        n = start + i
        share = tl.exp(tl.load(tops + place + n, mask=n < count, other=float("-inf")) - highest)
        total += share * tl.load(sums + place + n, mask=n < count, other=0.0)
        inside = (n < count)[:, None] & (c < SIZE)[None]
        part = tl.load(parts + (place + n)[:, None] * SIZE + c[None], mask=inside, other=0.0)
        acc += tl.sum(part * share[:, None], 0)
    value = tl.where(position < 0, 0.0, acc / tl.sum(total, 0)).to(out.dtype.element_ty)
    tl.store(out + (row.to(tl.int64) * tl.num_programs(1) + head) * SIZE + c, value, mask=c < SIZE)


def heads(
    x: Tensor,
    query_norm: Tensor,
    key_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    count: int,
    eps: float,
    value_norm: bool,
) -> Tensor:
    rows, size, kv_heads = len(x), query_norm.shape[0], keys.shape[1]
    has_values = x.shape[1] > (count + kv_heads) * size
    queries = torch.empty((rows, count * size), dtype=x.dtype, device=x.device)
    heads_kernel[(rows, x.shape[1] // size)](
        x, query_norm, key_norm, cos, sin, queries, keys, values, slots, positions, keys.shape[2], count, kv_heads,
        eps, STORES=key_norm is not None, HAS_VALUES=has_values, VALUE_NORM=value_norm, SIZE=size,
        HALF=triton.next_power_of_2(size // 2), num_warps=2, **FUSED,
    )  # fmt: skip
    return queries


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, window: int, span: int
) -> Tensor:
    kv_heads, ring, size = keys.shape[1:]
    rows, heads = len(queries), queries.shape[1] // size
    shape = shape_of(heads // kv_heads, size, kv_heads)
    seen = min(window, span)  # one more where the window begins inside a split
    splits = triton.cdiv(seen, shape["SPLIT"]) + 1
    # The last rows of a program see further than its first.
    programs = triton.cdiv(seen + shape["TOGETHER"], shape["SPLIT"]) + 1
    out = torch.empty_like(queries)
    at_once = max(16, MOST_BYTES // (heads * splits * size * 4) // 16 * 16)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        count = len(queries[part])
        parts = torch.empty((count, heads, splits, size), dtype=torch.float32, device=keys.device)
        tops, sums = torch.empty((2, count, heads, splits), dtype=torch.float32, device=keys.device)
        split_kernel[(count, kv_heads, programs)](
            queries[part], keys, values, slots[part], positions[part], parts, tops, sums, ring, window, count, kv_heads,
            splits, **shape, num_warps=4, num_stages=2, **FUSED,
        )  # fmt: skip
        sizes = {key: shape[key] for key in ("SIZE", "WIDTH", "SPLIT")}
        combine_kernel[(count, heads)](
            parts, tops, sums, positions[part], out[part], window, splits, **sizes, AT_ONCE=AT_A_TIME, num_warps=4,
            **FUSED,
        )  # fmt: skip
    return out


def shape_of(sharing: int, size: int, kv_heads: int) -> dict[str, int]:
    """Sizes of a program's work, by the layer alone."""
    group, wide = triton.next_power_of_2(sharing), size > 256
    return {
        "SHARING": sharing,
        "GROUP": group,
        "TOGETHER": max(1, (16 if wide else 32) // group),
        "SIZE": size,
        "WIDTH": max(16, triton.next_power_of_2(size)),
        "SPLIT": 128 if kv_heads <= 2 else 256,
        "BLOCK": 16 if wide else 32,
    }

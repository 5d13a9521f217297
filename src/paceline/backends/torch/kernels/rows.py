"""Operations on single rows: norms, gates, the choice of experts. One program for each row, or for a part of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.backends.torch.kernels.common import FUSED, gelu


@triton.jit
def normed(x, weight, size, eps):
    """x / rms(x) * weight, in float32; x is 0 beyond `size`."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / size + eps) * weight


@triton.jit
def norm_kernel(x, weight, out, size, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, normed(value, w, size, eps).to(out.dtype.element_ty), mask=inside)


@triton.jit
def join_kernel(
    x, branch, branch_norm, next_norm, scale, total, following, size, eps,
    SCALED: tl.constexpr, FOLLOWED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < size
    kind = total.dtype.element_ty
    value = tl.load(branch + row * size + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(branch_norm + at, mask=inside, other=0.0).to(tl.float32)
    value = normed(value, w, size, eps).to(kind).to(tl.float32)
    value = (tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32) + value).to(kind).to(tl.float32)
    if SCALED:
        value = value * tl.load(scale).to(tl.float32)
    value = value.to(kind)
    tl.store(total + row * size + at, value, mask=inside)
    if FOLLOWED:
        w = tl.load(next_norm + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(following + row * size + at, normed(value.to(tl.float32), w, size, eps).to(kind), mask=inside)


@triton.jit
def gated_kernel(gate, up, out, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    kind = out.dtype.element_ty
    value = gelu(tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
    factor = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, (value.to(tl.float32) * factor).to(kind), mask=inside)


@triton.jit
def choose_kernel(
    scores, expert_scale, weights, chosen, experts, ACTIVE: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    score = tl.load(scores + row * experts + at, mask=at < experts, other=float("-inf"))
    share = tl.exp(score - tl.max(score, 0))
    k = tl.arange(0, CHOICES)
    picked, shares = tl.zeros((CHOICES,), tl.int32), tl.zeros((CHOICES,), tl.float32)
    for i in tl.static_range(ACTIVE):
        best = tl.argmax(share, 0)
        picked = tl.where(k == i, best, picked)
        shares = tl.where(k == i, tl.max(share, 0), shares)
        share = tl.where(at == best, -1.0, share)
    scale = tl.load(expert_scale + picked).to(tl.float32)
    tl.store(weights + row * ACTIVE + k, shares / tl.sum(shares, 0) * scale, mask=k < ACTIVE)
    tl.store(chosen + row * ACTIVE + k, picked, mask=k < ACTIVE)


def _whole_row(size: int) -> dict[str, int]:
    return {"BLOCK": triton.next_power_of_2(size), "num_warps": 8 if size > 2048 else 4, **FUSED}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    norm_kernel[(len(x),)](x, weight, out, x.shape[1], eps, **_whole_row(x.shape[1]))
    return out


def join(
    x: Tensor, branch: Tensor, branch_norm: Tensor, next_norm: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x, branch = x.contiguous(), branch.contiguous()
    total, following = torch.empty_like(x), torch.empty_like(x)
    join_kernel[(len(x),)](
        x, branch, branch_norm, next_norm, scale, total, following, x.shape[1], eps,
        SCALED=scale is not None, FOLLOWED=next_norm is not None, **_whole_row(x.shape[1]),
    )  # fmt: skip
    return total, following


def gated(gate: Tensor, up: Tensor) -> Tensor:
    rows, size = gate.shape
    out = torch.empty((rows, size), dtype=gate.dtype, device=gate.device)
    grid = rows, triton.cdiv(size, 1024)
    gated_kernel[grid](gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=1024, **FUSED)
    return out


def choose(scores: Tensor, expert_scale: Tensor, active: int) -> tuple[Tensor, Tensor]:
    rows, experts = scores.shape
    weights = torch.empty((rows, active), dtype=torch.float32, device=scores.device)
    chosen = torch.empty((rows, active), dtype=torch.int32, device=scores.device)
    choose_kernel[(rows,)](
        scores, expert_scale, weights, chosen, experts,
        ACTIVE=active, CHOICES=triton.next_power_of_2(active), BLOCK=triton.next_power_of_2(experts),
        **FUSED,
    )  # fmt: skip
    return weights, chosen

"""What several kernels share."""

from __future__ import annotations

import os

import triton
import triton.language as tl

TILE = 16  # rows of every matrix product, whatever the pass: one order of summation for all

# Triton's interpreter takes bfloat16 for the bits that hold it, in products and when numbers are turned into it, and
# leaves products to a library whose sums depend on where a row stands. There, float32 and plain sums take their place.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


# Whether `a * b + c` may round once: always given, because the default depends on Triton's release.
FUSED, ROUNDED = {"enable_fp_fusion": True}, {"enable_fp_fusion": False}


@triton.jit
def product(a, b, acc):
    """acc + a @ b, products and sums in float32."""
    if INTERPRETED:
        return acc + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None], 1)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def whole(q):
    """Small integers as bfloat16, which holds them exactly."""
    if INTERPRETED:
        return q.to(tl.float32).to(tl.bfloat16)
    return q.to(tl.bfloat16)


@triton.jit
def gelu(x):
    """The tanh form, x in float32."""
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * (1.0 - 1.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def capped(x, cap):
    """cap * tanh(x / cap)"""
    return cap * (1.0 - 2.0 / (tl.exp(2.0 * x / cap) + 1.0))

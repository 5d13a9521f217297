"""Sampling a token from a row of logits: the reference implementation of the native and the device sampler.

The Gumbel-max trick: the largest of `logit / temperature + noise` among the allowed tokens is a sample of their
softmax. The noise is a pure function of (seed, position, token), from the counter-based generator
Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011), so it does not
matter where, when, or how often a token is sampled.

The same token must come out everywhere, so only single additions, multiplications, divisions and comparisons of float32
are used, in this order, and probabilities are summed as integers.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from paceline.types import Float32, SamplingParams

LOWEST = np.float32(-3e38)  # stands for NaN and minus infinity too; -LOWEST stands for infinity
UNIT = 1 << 30  # weight of the most likely token

LOG_COEFFICIENTS = (  # Cephes' logf
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
EXP_COEFFICIENTS = (  # Cephes' expf
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def sample(logits: Float32, params: SamplingParams, position: int) -> int:
    """The token at absolute `position`.

    Args:
        logits: [vocabulary], penalties and bias applied.
        params: temperature, top-k, top-p, min-p and seed; with temperature 0 the largest logit, of equals the first.
        position: of the sampled token.
    """
    x = clean(np.asarray(logits, np.float32))
    if params.temperature == 0:
        return int(x.argmax())
    ids = allowed(x, params)[0]
    depth = depths(x, params)[ids]
    score = depth + gumbel(params.seed or 0, position, ids)
    best = score == score.max()
    return int(ids[best].min())


def allowed(logits: Float32, params: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokens [n] that can be sampled at a temperature above 0, and their weights [n] in units of 2^-30 of the largest.

    Tokens rank by logit, of equals the lowest id first; the allowed ones are a prefix of that ranking.
    """
    x = clean(np.asarray(logits, np.float32))
    ids = np.argsort(-x, kind="stable").astype(np.int32)
    if 0 < params.top_k < len(ids):
        ids = ids[: params.top_k]
    depth = depths(x, params)[ids]
    weights = (exp(depth) * np.float32(UNIT)).astype(np.int64)
    if params.top_p < 1:
        sums = weights.cumsum()
        enough = params.top_p * float(sums[-1])
        last = int(np.searchsorted(sums.astype(np.float64), enough))
        ids, depth, weights = ids[: last + 1], depth[: last + 1], weights[: last + 1]
    near = depth >= -gap(params)
    return ids[near], weights[near]


def gap(params: SamplingParams) -> np.float32:
    """min-p as the largest distance from the best logit, in nats."""
    return np.float32(-math.log(params.min_p) if params.min_p > 0 else math.inf)


def depths(x: Float32, params: SamplingParams) -> Float32:
    """How far each logit is from the best, in nats: 0 or less."""
    with np.errstate(over="ignore"):
        return np.asarray((x - x.max()) / np.float32(params.temperature), np.float32)


def clean(logits: Float32) -> Float32:
    """Logits with NaN and minus infinity replaced by a very small number, infinity by a very large one."""
    return np.where(logits > LOWEST, np.minimum(logits, -LOWEST), LOWEST)


def gumbel(seed: int, position: int, ids: NDArray[np.int32]) -> Float32:
    """-log(-log(1 - u)) for each token id [n]: dense where it is large, for there lies the noise that wins."""
    u = (uniform_bits(seed, position, ids) >> np.uint32(1)).astype(np.int32).astype(np.float32)
    u = np.minimum((u + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    t, e = _split(np.float32(1) - u)
    near = u < np.float32(0.25)
    t, e = np.where(near, -u, t), np.where(near, np.float32(0), e)
    return -_log(*_split(-_log(t, e)))


def uniform_bits(seed: int, position: int, ids: NDArray[np.int32]) -> NDArray[np.uint32]:
    """32 random bits for each token id [n]: word (id / 16) mod 4 of the counter 16 (id / 64) + id mod 16."""
    ids = ids.astype(np.uint32)
    words = _philox((ids >> 6 << 4) + (ids & 15), position, seed)
    return np.asarray(np.choose(ids >> 4 & 3, words), np.uint32)


def _philox(counter: NDArray[np.uint32], position: int, seed: int) -> list[NDArray[np.uint32]]:
    """Philox4x32-10 of the counters (counter, position, 0, 0) under the key `seed`: four words each."""
    c = [counter.astype(np.uint64), *(np.full(counter.shape, word, np.uint64) for word in (position, 0, 0))]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> half) ^ c[1] ^ np.uint64(k0), p1 & low, (p0 >> half) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [word.astype(np.uint32) for word in c]


def _split(x: Float32) -> tuple[Float32, Float32]:
    """x = 2^e (1 + t) with t in [-0.293, 0.415], for normal positive x [n]."""
    bits = x.view(np.uint32)
    m = ((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F000000)).view(np.float32)
    e = ((bits >> 23).astype(np.int32) - 126).astype(np.float32)
    small = m < np.float32(0.70710678)
    return np.where(small, m + m, m) - np.float32(1), np.where(small, e - np.float32(1), e)


def _log(t: Float32, e: Float32) -> Float32:
    """log(2^e (1 + t))."""
    z = t * t
    y = np.full(t.shape, LOG_COEFFICIENTS[0], np.float32)
    for c in LOG_COEFFICIENTS[1:]:
        y = y * t + np.float32(c)
    y = y * t * z
    y = y + e * np.float32(-2.12194440e-4)
    y = y - z * np.float32(0.5)
    return np.asarray((t + y) + e * np.float32(0.693359375), np.float32)


def exp(x: Float32) -> Float32:
    """e^x to about 2 ulp, for x in [-87, 88] and clamped outside."""
    x = np.clip(x, np.float32(-87), np.float32(88))
    n = np.rint(x * np.float32(1.44269504))
    r = n * np.float32(2.12194440e-4) + (n * np.float32(-0.693359375) + x)
    p = np.full(x.shape, EXP_COEFFICIENTS[0], np.float32)
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + np.float32(c)
    e = (p * r * r + r) + np.float32(1)
    return np.asarray(e * ((n.astype(np.int32) + 127) << 23).astype(np.int32).view(np.float32), np.float32)

"""Samples from rows of logits: the tokens of `decode.sampler`, to the last bit of every intermediate number.

So nothing may be fused or approximated: kernels here are compiled without contraction, and divide exactly. The noise of
a token is a function of its number, so blocks of the vocabulary are sampled in parallel, and the best of the blocks'
best tokens wins. With a top-k, candidates are ranked by keys that hold a logit and, of equals the lowest first, its
token's number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.backends.torch import device_sampler
from paceline.backends.torch.kernels.common import ROUNDED
from paceline.decode.sampler import EXP_COEFFICIENTS, LOG_COEFFICIENTS

BLOCK = 1024  # tokens of a program

_COLUMNS = tl.constexpr(device_sampler.COLUMNS)
_TOP_K, _TOP_P = tl.constexpr(device_sampler.TOP_K), tl.constexpr(device_sampler.TOP_P)
_GAP, _SEED = tl.constexpr(device_sampler.GAP), tl.constexpr(device_sampler.SEED)
_LOG, _EXP = tl.constexpr(LOG_COEFFICIENTS), tl.constexpr(EXP_COEFFICIENTS)
_LOWEST = tl.constexpr(-3e38)
_UNIT = tl.constexpr(float(1 << 30))
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def cleaned(x):
    """See `decode.sampler.clean`."""
    return tl.where(x > _LOWEST, tl.minimum(x, -_LOWEST), _LOWEST)


@triton.jit
def split_float(x):
    """x = 2^e (1 + t); see `decode.sampler._split`."""
    bits = x.to(tl.int32, bitcast=True)
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    e = ((bits >> 23) - 126).to(tl.float32)
    small = m < 0.70710678
    return tl.where(small, m + m, m) - 1.0, tl.where(small, e - 1.0, e)


@triton.jit
def log(t, e):
    """log(2^e (1 + t)); see `decode.sampler._log`."""
    z = t * t
    y = tl.full(t.shape, _LOG[0], tl.float32)
    for i in tl.static_range(1, 9):
        y = y * t + _LOG[i]
    y = y * t * z
    y = y + e * -2.12194440e-4
    y = y - z * 0.5
    return (t + y) + e * 0.693359375


@triton.jit
def exp(x):
    """See `decode.sampler.exp`; adding 3 * 2^22 and taking it away rounds to a whole number."""
    x = tl.minimum(tl.maximum(x, -87.0), 88.0)
    n = (x * 1.44269504 + 12582912.0) - 12582912.0
    r = n * 2.12194440e-4 + (n * -0.693359375 + x)
    p = tl.full(x.shape, _EXP[0], tl.float32)
    for i in tl.static_range(1, 6):
        p = p * r + _EXP[i]
    e = (p * r * r + r) + 1.0
    return e * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def noise(words, position, ids):
    """Gumbel noise of tokens; see `decode.sampler.gumbel`."""
    seed, high = tl.load(words + _SEED).to(tl.uint32), tl.load(words + _SEED + 1).to(tl.uint32)
    counter = ((ids >> 6 << 4) + (ids & 15)).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = tl.philox_impl(counter, zero + position.to(tl.uint32), zero, zero, zero + seed, zero + high)
    word = (ids >> 4) & 3
    bits = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    u = ((bits >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    u = tl.minimum(u, 0.99999994)
    t, e = split_float(1.0 - u)
    near = u < 0.25
    t, e = tl.where(near, -u, t), tl.where(near, 0.0, e)
    t, e = split_float(-log(t, e))
    return -log(t, e)


@triton.jit
def depth_of(x, top, temperature):
    """How far logits are from the best, in nats; of greedy sampling at temperature 1."""
    return tl.div_rn(x - top, tl.where(temperature == 0.0, 1.0, temperature) + x * 0.0)


@triton.jit
def top_kernel(logits, tops, keys, vocabulary, RANKED: tl.constexpr, SIZE: tl.constexpr):
    """The largest logit of each block, and the keys that candidates are ranked by."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * SIZE + tl.arange(0, SIZE)
    inside = ids < vocabulary
    x = cleaned(tl.load(logits + row * vocabulary + ids, mask=inside, other=float("-inf")))
    tl.store(tops + row * tl.num_programs(1) + block, tl.max(x, 0))
    if RANKED:
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        tl.store(keys + row * vocabulary + ids, (order << 32) + (0x7FFFFFFF - ids).to(tl.int64), mask=inside)


@triton.jit
def score_kernel(
    logits, tops, settings, positions, scores, winners, weights, vocabulary, blocks, SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """The best token of each block, its score, and the weight of all that could be sampled; not for ranked rows."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    words = settings + row * _COLUMNS
    temperature = tl.load(words).to(tl.float32, bitcast=True)
    position = tl.load(positions + row)
    if (position >= 0) & ((temperature == 0.0) | (tl.load(words + _TOP_K) == 0)):
        b = tl.arange(0, BLOCKS)
        top = tl.max(tl.load(tops + row * blocks + b, mask=b < blocks, other=_LOWEST), 0)
        ids = block * SIZE + tl.arange(0, SIZE)
        inside = ids < vocabulary
        x = cleaned(tl.load(logits + row * vocabulary + ids, mask=inside, other=float("-inf")))
        depth = depth_of(x, top, temperature)
        score, gap = depth, _INFINITY
        if temperature > 0.0:
            gap = tl.load(words + _GAP).to(tl.float32, bitcast=True)
            score = depth + noise(words, position, ids)
        could = inside & (depth >= -gap)
        score = tl.where(could, score, float("-inf"))
        best = tl.max(score, 0)
        place = row * blocks + block
        tl.store(scores + place, best)
        tl.store(winners + place, tl.min(tl.where(could & (score == best), ids, 0x7FFFFFFF), 0))
        tl.store(weights + place, tl.sum(tl.where(could, (exp(depth) * _UNIT).to(tl.int64), 0), 0))


@triton.jit
def finish_kernel(
    logits, tops, settings, positions, scores, winners, weights, keys, tokens, confidence, vocabulary, blocks,
    candidates, RANKED: tl.constexpr, CANDIDATES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token of each row, from its blocks or from its ranked candidates, and how likely it was."""
    row = tl.program_id(0).to(tl.int64)
    words = settings + row * _COLUMNS
    temperature = tl.load(words).to(tl.float32, bitcast=True)
    position, top_k = tl.load(positions + row), tl.load(words + _TOP_K)
    b = tl.arange(0, BLOCKS)
    top = tl.max(tl.load(tops + row * blocks + b, mask=b < blocks, other=_LOWEST), 0)
    if position < 0:
        tl.store(tokens + row, 0)
        tl.store(confidence + row, 0.0)
    elif (temperature == 0.0) | (top_k == 0):
        bests = tl.load(scores + row * blocks + b, mask=b < blocks, other=float("-inf"))
        winner = tl.load(winners + row * blocks + b, mask=b < blocks, other=0x7FFFFFFF)
        all_weights = tl.sum(tl.load(weights + row * blocks + b, mask=b < blocks, other=0), 0)
        token = tl.min(tl.where(bests == tl.max(bests, 0), winner, 0x7FFFFFFF), 0)
        its_depth = depth_of(cleaned(tl.load(logits + row * vocabulary + token + b * 0)), top, temperature)
        mine = tl.max((exp(its_depth) * _UNIT).to(tl.int64), 0)
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(confidence + row, mine.to(tl.float32) / all_weights.to(tl.float32))
    elif RANKED:
        i = tl.arange(0, CANDIDATES)
        listed = (i < candidates) & (i < top_k)
        key = tl.load(keys + row * candidates + i, mask=listed, other=0x7FFFFFFF)
        ids = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
        depth = depth_of(cleaned(tl.load(logits + row * vocabulary + ids)), top, temperature)
        weight = tl.where(listed, (exp(depth) * _UNIT).to(tl.int64), 0)
        low, high = tl.load(words + _TOP_P), tl.load(words + _TOP_P + 1)
        bits = (high.to(tl.int64) << 32) + low.to(tl.uint32, bitcast=True).to(tl.int64)
        top_p = bits.to(tl.float64, bitcast=True)
        before = tl.cumsum(weight, 0) - weight
        enough = tl.where(top_p >= 1.0, _INFINITY, top_p * tl.sum(weight, 0).to(tl.float64))
        could = listed & ((i == 0) | (before.to(tl.float64) < enough))
        could = could & (depth >= -tl.load(words + _GAP).to(tl.float32, bitcast=True))
        score = tl.where(could, depth + noise(words, position, ids), float("-inf"))
        token = tl.min(tl.where(could & (score == tl.max(score, 0)), ids, 0x7FFFFFFF), 0)
        mine = tl.sum(tl.where(could & (ids == token), weight, 0), 0)
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(confidence + row, mine.to(tl.float32) / tl.sum(tl.where(could, weight, 0), 0).to(tl.float32))


def sample(logits: Tensor, settings: Tensor, positions: Tensor, ranked: bool) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    blocks, candidates = triton.cdiv(vocabulary, BLOCK), min(device_sampler.MOST_RANKED, vocabulary)
    settings, positions = settings.contiguous(), positions.contiguous()

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    tops = empty(rows, blocks, dtype=torch.float32)
    keys = empty(rows, vocabulary if ranked else 0, dtype=torch.int64)
    scores, winners = empty(rows, blocks, dtype=torch.float32), empty(rows, blocks, dtype=torch.int32)
    weights = empty(rows, blocks, dtype=torch.int64)
    tokens, confidence = empty(rows, dtype=torch.int64), empty(rows, dtype=torch.float32)
    top_kernel[(rows, blocks)](logits, tops, keys, vocabulary, RANKED=ranked, SIZE=BLOCK, **ROUNDED)
    padded = triton.next_power_of_2(blocks)
    score_kernel[(rows, blocks)](
        logits, tops, settings, positions, scores, winners, weights, vocabulary, blocks, SIZE=BLOCK, BLOCKS=padded,
        **ROUNDED,
    )  # fmt: skip
    best = keys.topk(candidates, dim=-1).values if ranked else keys
    finish_kernel[(rows,)](
        logits, tops, settings, positions, scores, winners, weights, best, tokens, confidence, vocabulary, blocks,
        candidates, RANKED=ranked, CANDIDATES=triton.next_power_of_2(candidates), BLOCKS=padded, **ROUNDED,
    )  # fmt: skip
    return tokens, confidence

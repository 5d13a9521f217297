"""Sampling on a device: sampling parameters as words of a tensor, and the reference form of sampling by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.decode.sampler import allowed, gap, sample
from paceline.types import Float32, Int32, SamplingParams

MOST_RANKED = 128  # candidates that a device ranks

TEMPERATURE, TOP_K, TOP_P, MIN_P, GAP, SEED, COLUMNS = 0, 1, 2, 4, 6, 7, 9  # columns; 64-bit ones take two


def on_device(params: SamplingParams) -> bool:
    """Whether devices sample this way: not from a nucleus of the whole vocabulary, which would have to be sorted."""
    return params.temperature == 0 or 0 < params.top_k <= MOST_RANKED or (not params.top_k and params.top_p >= 1)


def ranked(params: SamplingParams) -> bool:
    """Whether sampling this way ranks candidates."""
    return params.temperature > 0 and params.top_k > 0


def pack_settings(params: Sequence[SamplingParams], rows: int) -> Int32:
    """Sampling parameters as 32-bit words [rows, COLUMNS]; rows beyond the given ones are greedy."""
    packed = np.zeros((rows, COLUMNS), np.int32)
    for words, p in zip(packed, params, strict=False):
        words[TEMPERATURE : TEMPERATURE + 1] = np.array([p.temperature], np.float32).view(np.int32)
        words[TOP_K] = min(p.top_k, (1 << 31) - 1)
        words[TOP_P:GAP] = np.array([p.top_p, p.min_p]).view(np.int32)
        words[GAP : GAP + 1] = np.array([gap(p)], np.float32).view(np.int32)
        words[SEED:COLUMNS] = np.array([p.seed or 0], np.uint64).view(np.int32)
    return packed


def unpack_settings(words: Int32) -> SamplingParams:
    """The parameters in a row of `pack_settings`."""
    temperature = float(words[TEMPERATURE : TEMPERATURE + 1].view(np.float32)[0])
    top_p, min_p = words[TOP_P:GAP].copy().view(np.float64).tolist()
    seed = int(words[SEED:COLUMNS].copy().view(np.uint64)[0])
    return SamplingParams(temperature, int(words[TOP_K]), top_p, min_p, seed=seed)


def sample_rows(logits: Float32, settings: Int32, positions: NDArray[Any]) -> tuple[NDArray[np.int64], Float32]:
    """Tokens [M] sampled from logits [M, vocabulary], and the probability of each among those it could be."""
    tokens, confidence = np.zeros(len(logits), np.int64), np.zeros(len(logits), np.float32)
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        params = unpack_settings(settings[row])
        token = tokens[row] = sample(logits[row], params, position)
        if params.temperature == 0:
            confidence[row] = 1 / np.exp(logits[row] - logits[row, token]).sum()
        else:
            ids, weights = allowed(logits[row], params)
            confidence[row] = weights[ids == token].sum() / weights.sum()
    return tokens, confidence

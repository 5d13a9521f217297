"""Log-probabilities of tokens, as the target gave them: after temperature, before all else."""

from __future__ import annotations

import math

import numpy as np

from paceline.types import Float32, Logprobs

MAX_LOGPROBS = 100


def logprobs_of(logits: Float32, token: int, count: int, temperature: float) -> Logprobs:
    """Log-probabilities of a token and of the `count` most likely ones.

    Args:
        logits: [vocabulary], as the target gave them.
        token: the sampled token.
        count: how many alternatives to name.
        temperature: of the sampling; probabilities of greedy decoding are those at 1.
    """
    scaled = np.asarray(logits, np.float64) / (temperature or 1.0)
    scaled -= scaled.max()
    scaled -= math.log(np.exp(scaled).sum())
    if not count:
        return Logprobs(float(scaled[token]), ())
    count = min(count, len(scaled))
    least = np.partition(scaled, len(scaled) - count)[len(scaled) - count]
    best = np.flatnonzero(scaled >= least)
    best = best[np.lexsort((best, -scaled[best]))][:count]
    return Logprobs(float(scaled[token]), tuple((int(i), float(scaled[i])) for i in best))

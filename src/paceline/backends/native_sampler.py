"""Draws by the compiled code, for every backend: the same tokens as `decode.sampler`, faster."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.decode.sampler import gap
from paceline.types import Row, SamplingParams


def draw(logits: Row, sampling: SamplingParams, position: int) -> int:
    """See `backends.base.Backend.draw`."""
    x = np.asarray(logits, np.float32)
    return int(x.argmax()) if sampling.temperature == 0 else _cpu.draw(x, native_draw(sampling, 0), position)


def allowed(logits: Row, sampling: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """See `backends.base.Backend.allowed`."""
    return _cpu.allowed(np.asarray(logits, np.float32), native_draw(sampling, 0))


@lru_cache(maxsize=64)
def native_draw(sampling: SamplingParams, stream: int) -> _cpu.Draw:
    """Settings of a draw as the native code takes them."""
    return _cpu.Draw(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        gap=float(gap(sampling)),
        seed=sampling.seed or 0,
        stream=stream,
    )

"""The native sampler, for rows of logits on the host: the same tokens as `decode.sampler`, faster."""

from __future__ import annotations

from functools import lru_cache

from paceline import _cpu
from paceline.decode.sampler import gap
from paceline.types import Float32, SamplingParams


def sample(logits: Float32, params: SamplingParams, position: int) -> int:
    """The token sampled from logits [vocabulary] at an absolute position; see `decode.sampler`."""
    return int(logits.argmax()) if params.temperature == 0 else _cpu.draw(logits, _native(params), position)


@lru_cache(maxsize=64)
def _native(p: SamplingParams) -> _cpu.Draw:
    gap_ = float(gap(p))
    return _cpu.Draw(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, gap=gap_, seed=p.seed or 0, stream=0)

"""The native sampler for rows of logits on the host: the same tokens as `decode.sampler`, faster."""

from __future__ import annotations

from paceline import _cpu
from paceline.types import Float32, SamplingParams


def sample(logits: Float32, params: SamplingParams, position: int) -> int:
    """The token sampled from logits [vocabulary] at an absolute position; see `decode.sampler.sample`."""
    return _cpu.sample(logits, params, position)

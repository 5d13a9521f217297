"""Settings of sampling: what they may be, and what they do to logits before a token is drawn."""

from __future__ import annotations

import math

from paceline.errors import SettingsError
from paceline.types import SamplingParams

MOST_SHIFT = 1e6  # of a logit, by bias or penalties


def check_sampling_params(sampling: SamplingParams, vocab_size: int) -> SamplingParams:
    """Return the settings if a model of that vocabulary can draw with them.

    Raises:
        SettingsError: a number out of range, NaN, or a token that the model does not have.
    """
    for name, least, most in (
        ("temperature", 0.0, math.inf),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -MOST_SHIFT, MOST_SHIFT),
        ("frequency_penalty", -MOST_SHIFT, MOST_SHIFT),
        ("repetition_penalty", 0.01, 100.0),
    ):
        value = getattr(sampling, name)
        if not least <= value <= most or math.isinf(value):
            between = f"between {least:g} and {most:g}" if most < math.inf else f"a number, {least:g} or more"
            raise SettingsError(f"{name} is {value}; it must be {between}")
    if 0 < sampling.temperature < 1e-4:
        raise SettingsError(f"temperature is {sampling.temperature}; use 0 for greedy decoding, or 0.0001 and more")
    if not 0 <= sampling.top_k < 1 << 63:
        raise SettingsError(f"top_k is {sampling.top_k}; it must be 0 (all tokens) or more, and below 2^63")
    if sampling.seed is not None and not 0 <= sampling.seed < 1 << 64:
        raise SettingsError(f"seed is {sampling.seed}; it must be between 0 and 2^64 - 1")
    for token, value in sampling.bias:
        if not -MOST_SHIFT <= value <= MOST_SHIFT:
            raise SettingsError(
                f"the bias of token {token} is {value}; it must be between {-MOST_SHIFT:g} and {MOST_SHIFT:g}"
            )
    for what, tokens in (("a bias is on", (t for t, _ in sampling.bias)), ("suppressed is", sampling.suppressed)):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise SettingsError(f"{what} token {token}, and the model's tokens are 0 to {vocab_size - 1}")
    if len(set(sampling.suppressed)) >= vocab_size:
        raise SettingsError("all tokens are suppressed; leave at least one")
    return sampling

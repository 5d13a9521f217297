"""Sampling parameters: each is declared once, here, with its default, its range and its help.

The check of their values, the options of the command line, `/set` in a chat, and the fields of requests to the server
are made from these declarations. This module imports nothing heavy, because `paceline --help` needs it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from paceline.errors import SettingsError

MAX_ADJUSTMENT = 1e6  # of a logit, by bias or penalties
NO_LIMIT = math.inf


@dataclass(frozen=True)
class Parameter:
    """What there is to know about a numeric parameter besides its name and default."""

    help: str
    low: float  # the range, both ends included
    high: float
    kind: type[int] | type[float] = float
    api_range: tuple[float, float] | None = None  # in requests to the server, where it differs
    metavar: str = "NUMBER"
    in_responses: bool = True  # a field of /v1/responses too, not only of chat and completions
    checkpoint: Literal["sampling", "always"] | None = (
        None  # read from generation_config.json: if it samples, or always
    )

    def check(self, name: str, value: float | None) -> None:
        """Raise `SettingsError` if a value is out of range, infinite or NaN."""
        if value is not None and not self.low <= value <= min(self.high, sys.float_info.max):
            low, high = _shown(self.low), _shown(self.high)
            allowed = f"a number, {low} or more" if self.high == NO_LIMIT else f"between {low} and {high}"
            raise SettingsError(f"{name} is {value}; it must be {allowed}")


def _number(default: float | None, *about: Any, **more: Any) -> Any:
    """A field of `SamplingParams` with its `Parameter`."""
    return field(default=default, metadata={"parameter": Parameter(*about, **more)})


def _penalty(text: str) -> Any:
    return _number(0.0, text, -MAX_ADJUSTMENT, MAX_ADJUSTMENT, api_range=(-2, 2), in_responses=False)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled from the target's logits. The default is greedy decoding.

    A token's noise is a pure function of seed, position and token id, so equal settings give equal text. Penalties and
    bias come first, then temperature, then top-k, top-p of what top-k left, and min-p.
    """

    temperature: float = _number(0.0, "0 is greedy decoding, 1 samples as trained.", 0, NO_LIMIT, checkpoint="sampling")
    top_k: int = _number(
        0,
        "Only the K most likely tokens; 0 for all.",
        0,
        (1 << 63) - 1,
        int,
        (-1, (1 << 31) - 1),
        "K",
        checkpoint="sampling",
    )
    top_p: float = _number(
        1.0, "Only the fewest tokens whose probabilities sum to this; 1 for all.", 0, 1, checkpoint="sampling"
    )
    min_p: float = _number(
        0.0,
        "Only tokens at least this likely, relative to the most likely one; 0 for all.",
        0,
        1,
        checkpoint="sampling",
    )
    repetition_penalty: float = _number(
        1.0, "Divides positive and multiplies negative logits of tokens so far.", 0.01, 100, checkpoint="always"
    )
    presence_penalty: float = _penalty("Subtracted from the logits of generated tokens.")
    frequency_penalty: float = _penalty("Subtracted from the logits of generated tokens, once per occurrence.")
    bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these tokens
    suppressed: tuple[int, ...] = ()  # tokens that are never sampled
    seed: int | None = _number(
        None,
        "Equal seeds give equal text; random if not given.",
        0,
        (1 << 64) - 1,
        int,
        (-(1 << 63), (1 << 64) - 1),
        "N",
    )


GREEDY = SamplingParams()
OFFICIAL: Mapping[str, Any] = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}  # of all Gemma 4 models
PARAMETERS: Mapping[str, Parameter] = {
    one.name: one.metadata["parameter"] for one in fields(SamplingParams) if one.metadata
}
"""The numeric parameters by name."""


def or_official(own: SamplingParams) -> SamplingParams:
    """A model's own settings, with the official sampling where its files ask for none: GGUF files seldom do."""
    return own if own.temperature else replace(own, **OFFICIAL)


def check_sampling_params(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """Return the parameters if they can be used with a vocabulary of that size.

    Raises:
        SettingsError: a number out of range, NaN, or a token that the model does not have.
    """
    for name, parameter in PARAMETERS.items():
        parameter.check(name, getattr(params, name))
    if 0 < params.temperature < 1e-4:
        raise SettingsError(f"temperature is {params.temperature}; use 0 for greedy decoding, or 0.0001 and more")
    for token, value in params.bias:
        if not -MAX_ADJUSTMENT <= value <= MAX_ADJUSTMENT:
            between = f"between {-MAX_ADJUSTMENT:g} and {MAX_ADJUSTMENT:g}"
            raise SettingsError(f"the bias of token {token} is {value}; it must be {between}")
    for what, tokens in (("a bias is on", (t for t, _ in params.bias)), ("suppressed is", params.suppressed)):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise SettingsError(f"{what} token {token}, and the model's tokens are 0 to {vocab_size - 1}")
    if len(set(params.suppressed)) >= vocab_size:
        raise SettingsError("all tokens are suppressed; leave at least one")
    return params


def _shown(bound: float) -> str:
    if isinstance(bound, int) and bound >= 1 << 31:
        return f"2^{bound.bit_length()} - 1"
    return f"{bound:g}"

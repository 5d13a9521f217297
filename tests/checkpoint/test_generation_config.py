"""The sampling that a checkpoint recommends."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.checkpoint.checkpoint import Checkpoint
from paceline.errors import CheckpointError
from paceline.types import SamplingParams


def sampling(**generation: object) -> SamplingParams:
    return Checkpoint(Path("model"), {}, generation, {}, {}).sampling()


def test_sampling_is_greedy_unless_asked_for() -> None:
    assert sampling() == sampling(do_sample=False, temperature=0.7, top_k=9) == SamplingParams()


def test_what_is_missing_is_off() -> None:
    assert sampling(do_sample=True) == SamplingParams(temperature=1.0)
    assert sampling(do_sample=True, temperature=1.0, top_k=64, top_p=0.95) == SamplingParams(1.0, 64, 0.95)
    assert sampling(do_sample=True, top_k=None, min_p=0.1) == SamplingParams(1.0, min_p=0.1)


def test_greedy_keeps_penalties_and_suppressed_tokens() -> None:
    found = sampling(suppress_tokens=[258882, 258883], repetition_penalty=1.1)
    assert found == SamplingParams(suppressed=(258882, 258883), repetition_penalty=1.1)


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_k": 1.5}, {"top_p": True}, {"suppress_tokens": "5"}])
def test_what_is_no_number_is_named(wrong: dict) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {next(iter(wrong))} is"):
        sampling(do_sample=True, **wrong)

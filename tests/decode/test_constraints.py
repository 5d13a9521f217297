"""Sampling parameters: what is refused, what penalties, bias and grammars do, log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paceline.decode.acceptance import accept
from paceline.decode.constraints import Grammar, LogitsConstraint, constraint_of
from paceline.decode.logprobs import logprobs_of
from paceline.decode.sampler import sample
from paceline.errors import SettingsError
from paceline.sampling_params import check_sampling_params
from paceline.types import GREEDY, SamplingParams, Work


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1e-6}, "use 0 for greedy"),
        ({"top_p": -0.01}, "top_p is -0.01; it must be between 0 and 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1 << 63}, "top_k is 9223372036854775808"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf; it must be between -1e+06 and 1e+06"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616"),
        ({"bias": ((8, 1.0),)}, "token 8, and the model's tokens are 0 to 7"),
        ({"bias": ((3, math.nan),)}, "bias of token 3 is nan"),
        ({"bias": ((3, 1e300),)}, "bias of token 3 is 1e+300"),
        ({"suppressed": (9,)}, "suppressed is token 9"),
        ({"suppressed": tuple(range(8))}, "all tokens are suppressed"),
    ],
)
def test_settings_out_of_range(settings: dict, cause: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_sampling_params(SamplingParams(**settings), 8)
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_at_the_edge() -> None:
    edge = SamplingParams(1e-4, 1 << 40, 0.0, 1.0, 0.01, -2.0, -2.0, ((7, -100.0),), (0, 1), (1 << 64) - 1)
    assert check_sampling_params(edge, 8) is edge


LOGITS = np.array([2.0, -2.0, 1.0, 0.0, 4.0], np.float32)


def constrained(params: SamplingParams, prompt: tuple = (), text: tuple = (), grammar: Grammar | None = None) -> list:
    """LOGITS after a constraint."""
    constraint = LogitsConstraint(params, prompt, grammar)
    for token in text:
        constraint.commit(token)
    logits = LOGITS.copy()
    constraint.apply(logits)
    return logits.tolist()


def test_no_constraint_where_logits_stay_as_they_are() -> None:
    assert constraint_of(SamplingParams(1.0, 2, 0.5, 0.1), [0], None) is None
    for name, value in (("repetition_penalty", 1.1), ("bias", ((1, 1.0),)), ("suppressed", (1,))):
        assert constraint_of(SamplingParams(**{name: value}), [0], None) is not None


def test_penalties_bias_and_suppressed_tokens() -> None:
    seen = {"prompt": (0, 1), "text": (4, 4, 2)}
    assert constrained(SamplingParams(repetition_penalty=2.0), **seen) == [1, -4, 0.5, 0, 2]
    assert constrained(SamplingParams(presence_penalty=1.0), **seen) == [2, -2, 0, 0, 3]
    assert constrained(SamplingParams(frequency_penalty=1.0), **seen) == [2, -2, 0, 0, 2]
    assert constrained(SamplingParams(bias=((3, 9.0), (3, -1.0))), **seen) == [2, -2, 1, 8, 4]
    assert constrained(SamplingParams(suppressed=(4, 0)), **seen) == [-np.inf, -2, 1, 0, -np.inf]


def test_suppressed_tokens_are_never_sampled() -> None:
    hot = SamplingParams(temperature=50.0, suppressed=(0, 2, 3, 4), seed=1)
    logits = np.array(constrained(hot), np.float32)
    assert {sample(logits, hot, position) for position in range(200)} == {1}


def test_logprobs() -> None:
    report = logprobs_of(LOGITS, 2, 3, 0.5)
    exact = LOGITS.astype(np.float64) / 0.5
    exact -= np.log(np.exp(exact).sum())
    assert report.token == pytest.approx(exact[2])
    assert [token for token, _ in report.top] == [4, 0, 2]
    assert [value for _, value in report.top] == pytest.approx(sorted(exact)[::-1][:3])
    assert logprobs_of(LOGITS, 4, 0, 0.0).top == ()
    assert logprobs_of(LOGITS, 4, 0, 0.0) == logprobs_of(LOGITS, 4, 0, 1.0)
    assert sum(math.exp(value) for _, value in logprobs_of(LOGITS, 0, 99, 1.0).top) == pytest.approx(1)
    tied = logprobs_of(np.zeros(6, np.float32), 0, 2, 1.0)
    assert [token for token, _ in tied.top] == [0, 1]


class Only:
    """A grammar that allows some tokens at each place."""

    failed = False

    def __init__(self, *places: set[int]) -> None:
        self.places, self.written = list(places), []

    def allowed(self) -> np.ndarray:
        return np.isin(np.arange(5), list(self.places[len(self.written)]))

    def advance(self, token: int) -> None:
        self.written.append(token)

    def forced(self) -> tuple[int, ...]:
        return ()


def verify(drafted: tuple[int, ...], grammar: Only) -> tuple[int, ...]:
    work = Work(0, 0, [1], GREEDY, constraint=LogitsConstraint(GREEDY, (), grammar))

    def sampled(row: int) -> int:
        logits = LOGITS.copy()
        work.constraint.apply(logits)
        return int(logits.argmax())

    return accept(work, drafted, sampled)


def test_grammars_mask_each_row_at_its_place() -> None:
    grammar = Only({1, 2}, {0, 3}, {4})
    assert (verify((2, 0), grammar), grammar.written) == ((2, 0, 4), [2, 0, 4])
    grammar = Only({1, 2}, {0, 3}, {4})  # a draft that is not allowed: nothing goes beyond it
    assert (verify((4, 0), grammar), grammar.written) == ((2,), [2])


def test_grammars_win_over_suppressed_tokens() -> None:
    logits = constrained(SamplingParams(suppressed=(1, 2)), grammar=Only({1, 2}))
    assert np.flatnonzero(np.array(logits) > -np.inf).tolist() == [1, 2]

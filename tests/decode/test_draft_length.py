"""Chances of drafts from what was observed, and where a draft stops paying."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.decode.draft_length import MAX_DEPTH, PRIOR, Acceptance, expected_gains, stop_floors
from paceline.types import CONFIDENCE_BINS, Result


def outcome(drafted: int, accepted: int, *confidence: float) -> Result:
    return Result((0,) * (accepted + 1), (0,) * drafted, confidence)


def seen(*rounds: tuple[int, int]) -> Acceptance:
    acceptance = Acceptance()
    for drafted, accepted in rounds:
        acceptance.observe(outcome(drafted, accepted))
    return acceptance


def test_chances_follow_what_was_accepted() -> None:
    assert Acceptance().chances() == pytest.approx([PRIOR] * MAX_DEPTH)
    chances = seen(*[(3, 1), (3, 3)] * 40).chances()
    assert chances[0] > 0.97
    assert chances[1] == pytest.approx(0.5, abs=0.1)  # those after an accepted first draft
    assert chances[2] > 0.8
    assert chances[3] > 0.7  # not seen: like the one before it
    assert max(seen(*[(3, 0)] * 40).chances()) < 0.1


def test_what_was_seen_grows_old_while_nothing_is_drafted() -> None:
    """Then the average of a longer time counts."""
    acceptance = seen(*[(2, 2)] * 150, *[(2, 0)] * 50)
    low = acceptance.chances()[0]
    acceptance.rested = 100
    assert low < 0.35 < 0.5 < acceptance.chances()[0]
    acceptance.observe(outcome(2, 0))
    assert acceptance.rested == 0
    assert acceptance.chances()[0] > low


def test_the_next_text_starts_with_little_of_it() -> None:
    before = seen(*[(2, 0)] * 100)
    after = before.for_next_text()
    assert after.tried_long == before.tried_long
    assert 0 < after.tried[0] < before.tried[0] / 2
    assert before.chances()[0] < after.chances()[0] < 0.2
    after.observe(outcome(2, 2, 0.9, 0.9))
    assert sum(before.sure_tried) == 0  # they share nothing


@given(st.lists(st.tuples(st.integers(0, 15), st.floats(0, 1), st.floats(allow_nan=True)), max_size=60))
def test_chances_are_chances(rounds: list[tuple[int, float, float]]) -> None:
    acceptance = Acceptance()
    for drafted, share, confidence in rounds:
        acceptance.observe(outcome(drafted, int(share * drafted), *[confidence] * drafted))
        assert all(0 <= p <= 1 for p in (*acceptance.chances(), *acceptance.by_confidence()))


def test_confidence_is_calibrated_by_what_it_was_worth() -> None:
    acceptance = Acceptance()
    for _ in range(40):
        acceptance.observe(outcome(1, 1, 0.99))
        acceptance.observe(outcome(1, 0, 0.5))
    chances = acceptance.by_confidence()
    assert len(chances) == CONFIDENCE_BINS
    assert chances[-1] > 0.95
    assert chances[CONFIDENCE_BINS // 2] < 0.1


@pytest.mark.parametrize("confidence", [math.nan, math.inf, -1.0, 7.0, 0.0, 1.0])
def test_any_confidence_is_borne(confidence: float) -> None:
    acceptance = Acceptance()
    acceptance.observe(outcome(1, 1, confidence))
    assert sum(acceptance.sure_tried) == 1


def test_gains_add_up() -> None:
    assert expected_gains([0.5, 0.5, 0.0, 1.0]) == [0, 0.5, 0.75, 0.75, 0.75]


def test_floors_say_when_the_next_draft_breaks_even() -> None:
    # A millisecond is worth one token. From depth 1, 2.1 ms buy half and a quarter of the draft's chance; from depth 2,
    # 0.1 ms buys half of it.
    floors = stop_floors([10.0, 11.0, 13.0, 13.1], (0.5,) * 8, 1.0)
    assert floors[0] == pytest.approx(2.1 / 0.75)
    assert floors[1] == pytest.approx(0.1 / 0.5)
    assert floors[2] > 1  # nothing deeper

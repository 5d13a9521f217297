"""What steps cost: learned from few of them, through noise, with stairs, on machines that change."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.cost_model import GUESSED_ROW, OUTLIER, StepCosts


def after(*steps: tuple[int, float], count: int = 1, given: bool = False) -> StepCosts:
    """The model after steps whose drafts had that length and which took so many milliseconds."""
    costs = StepCosts(count)
    for length, ms in steps:
        costs.observe(0 if given else length, length * count, ms)
    return costs


def test_prices_are_those_observed() -> None:
    costs = after(*[(0, 10.0), (1, 12.0), (3, 13.0)] * 30)
    assert [costs.price(length) for length in (0, 1, 3)] == pytest.approx([10, 12, 13], rel=0.02)
    assert costs.longest == 3
    assert costs.seen(3)
    assert not costs.seen(2)


def test_other_lengths_lie_on_the_line() -> None:
    costs = after(*[(0, 10.0), (2, 14.0), (4, 24.0)] * 30)
    assert costs.price(1) == pytest.approx(10 + 4 * 0.5**0.5, rel=0.02)  # the first rows are the dearest
    assert costs.price(3) == pytest.approx(19, rel=0.02)
    assert costs.price(6) == pytest.approx(31, rel=0.05)  # it goes on
    assert after((0, 10.0)).price(2) == pytest.approx(10 + 2 * GUESSED_ROW * 10)


def test_tokens_that_are_there_already_cost_no_more_than_drafted_ones() -> None:
    costs = after(*[(0, 10.0), (2, 14.0)] * 30)
    assert costs.price(2, given=True) == costs.price(2)
    for _ in range(40):
        costs.observe(0, 2, 11.0)
    assert costs.price(2, given=True) == pytest.approx(11, rel=0.05)
    assert costs.price(2) == pytest.approx(14, rel=0.1)


def test_a_step_of_several_costs_by_its_rows() -> None:
    costs = StepCosts(4)
    for _ in range(40):
        costs.observe(0, 0, 10.0)
        costs.observe(2, 8, 18.0)
        costs.observe(2, 4, 14.0)  # two of four drafted
    assert costs.price(8) == pytest.approx(18, rel=0.05)
    assert costs.price(4) == pytest.approx(14, rel=0.05)
    assert costs.price(6) == pytest.approx(16, rel=0.05)


def test_a_stair_is_not_taken_for_a_slower_machine() -> None:
    """One row more than fits in a tile costs as much as many, and long without a plain step to compare with."""
    costs = after(*[(0, 2.5)] * 10, count=8)
    for _ in range(100):
        for rows, ms in ((1, 3.4), (2, 3.5), (4, 3.8)):
            costs.observe(1, rows, ms)
    assert costs.plain == pytest.approx(2.5, rel=0.05)
    assert costs.price(1) == pytest.approx(3.4, rel=0.05)


def test_a_machine_that_slows_down_changes_no_ratio() -> None:
    """Prices of lengths that do not occur any more follow, too."""
    costs = after(*[(0, 10.0), (1, 11.0), (2, 15.0)] * 20)
    before = costs.price(2) / costs.price(0)
    for _ in range(100):
        costs.observe(1, 1, 22.0)
    assert costs.price(1) == pytest.approx(22, rel=0.05)
    assert costs.price(0) == pytest.approx(20, rel=0.2)
    assert costs.price(2) / costs.price(0) == pytest.approx(before, rel=0.1)


def test_one_slow_step_counts_in_part() -> None:
    """The first one of its kind on a device takes seconds, and something else may run."""
    costs = after((0, 10.0), (0, 10.0), (1, 5000.0))
    assert costs.price(1) < OUTLIER * 1.3 * 10
    for _ in range(12):
        costs.observe(1, 1, 11.0)
    assert costs.price(1) == pytest.approx(11, rel=0.15)


def test_noise_averages_out() -> None:
    dice, costs = random.Random(0), StepCosts(1)
    for _ in range(200):
        for length, ms in ((0, 50.0), (1, 55.0), (3, 70.0)):
            costs.observe(length, length, ms * dice.lognormvariate(0, 0.05) * (1.5 if dice.random() < 0.02 else 1))
    assert costs.price(3) / costs.price(0) == pytest.approx(1.4, rel=0.05)
    assert costs.price(1) / costs.price(0) == pytest.approx(1.1, rel=0.05)


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(0, 8), st.floats(0, 1), st.booleans(), st.floats(0, 1e6)), max_size=50),
)
def test_prices_are_always_times(count: int, steps: list[tuple[int, float, bool, float]]) -> None:
    costs = StepCosts(count)
    for length, share, is_given, ms in steps:
        rows = max(length, int(share * length * count))
        costs.observe(0 if is_given else length, rows, ms)
        prices = [costs.price(n, given=kind) for n in range(16) for kind in (False, True)]
        assert all(0 < price < 1e9 for price in prices)
        assert costs.plain == costs.price(0) <= min(prices)

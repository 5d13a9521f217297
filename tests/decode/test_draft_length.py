"""The draft length that pays: simulated rounds with measured costs and made-up acceptance."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.decode.draft_length import (
    MAX_DEPTH,
    Costs,
    Drift,
    State,
    acceptance,
    next_plan,
    next_request,
    observe,
    observe_shared,
    share_out,
    shared_price,
    stop_floors,
    useless,
)
from paceline.types import CONFIDENCE_BINS, Draft, Result

# Milliseconds of rounds of depth 0 to 8: measured ones, and two made up to be hard.
COSTS = {
    "E2B q4, fast memory": Costs((28.7, 28.7, 29.8, 30.9, 34.0, 38.0, 42.0, 44.5, 49.8)),
    "E2B q4, slow memory": Costs((44.0, 45.3, 48.4, 52.4, 57.2, 62.5, 67.3, 72.6, 83.6)),
    "E2B bf16": Costs((144.0, 144.6, 145.4, 146.9, 151.2, 155.5, 161.3, 167.0, 273.6)),
    "tiny-python": Costs((0.323, 0.421, 0.476, 0.512, 0.58, 0.639, 0.697, 0.749, 0.952), token=0.02),
    "experts, steep": Costs((60.0, 96.0, 120.0, 141.0, 159.0, 174.0, 186.0, 198.0, 210.0)),
    "stairs": Costs((10.0, 10.2, 10.4, 10.6, 19.0, 19.2, 19.4, 19.6, 29.0)),
}
Chances = tuple[float, ...]
# Chance of the draft at depth 1, 2, ... given those before it, at the n-th token.
PROFILES: dict[str, Callable[[int], Chances]] = {
    "rising": lambda _: (0.73, 0.76, 0.79, 0.82, 0.83, 0.84, 0.85, 0.86),
    "falling": lambda _: (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    "even": lambda _: (0.6,) * 8,
    "high": lambda _: (0.95,) * 8,
    "low": lambda _: (0.25,) + (0.2,) * 7,
    "zero": lambda _: (0.0,) * 8,
    "bursts": lambda n: (0.95,) * 8 if n // 150 % 2 == 0 else (0.05,) * 8,
}


@dataclass(frozen=True)
class Outcome:
    speed: float  # tokens a millisecond
    state: State


def outcome(drafted: int, accepted: int, *confidence: float) -> Result:
    return Result((0,) * (accepted + 1), (0,) * drafted, confidence)


def simulate(
    costs: Costs, profile: Callable[[int], Chances], tokens: int, depth: int | None, seed: int, sure: bool = False
) -> Outcome:
    """Rounds at a fixed depth, or at the controller's. Its clock is noisy; the speed is by the true costs.

    `sure`: the drafter's confidence tells good drafts from bad ones to some degree; else it is the same for all.
    """
    chance, noise, state, done, spent = random.Random(seed), random.Random(~seed), State(), 0, 0.0
    while done < tokens:
        if depth is None and state.plan is None:
            state = replace(state, plan=next_plan(state, costs))
        plan = Draft(length=depth) if depth is not None else state.plan
        right, confidence, line = [], [], 1.0
        for p in profile(done)[: plan.length]:
            right.append(chance.random() < p)
            confidence.append(chance.betavariate(6, 2) if right[-1] else chance.betavariate(2, 3) if sure else p)
            if plan.floors:
                line *= plan.acceptance[min(CONFIDENCE_BINS - 1, int(confidence[-1] * CONFIDENCE_BINS))]
                if line < plan.floors[len(right) - 1]:
                    break
        accepted = [*right, False].index(False)
        took = costs.rounds[len(right)] + costs.token * accepted
        spent, done = spent + took, done + accepted + 1
        state = observe(state, costs, outcome(len(right), accepted, *confidence), took * math.exp(noise.gauss(0, 0.05)))
    return Outcome(done / spent, state)


@cache
def speed(costs: str, profile: str, depth: int | None, sure: bool = False) -> float:
    runs = (simulate(COSTS[costs], PROFILES[profile], 3000, depth, seed, sure).speed for seed in range(4))
    return sum(runs) / 4


@pytest.mark.slow
@pytest.mark.parametrize("sure", [False, True], ids=["even confidence", "telling confidence"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("costs", COSTS)
def test_within_three_percent_of_the_best_fixed_depth(costs: str, profile: str, sure: bool) -> None:
    best = max(speed(costs, profile, depth) for depth in range(MAX_DEPTH + 1))
    assert speed(costs, profile, None, sure) > 0.97 * best


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("costs", COSTS)
def test_never_slower_than_plain_decoding(costs: str, profile: str) -> None:
    """Over 500 tokens, from a cold start, in every one of many runs."""
    plain = 1 / COSTS[costs].rounds[0]
    for seed in range(20):
        assert simulate(COSTS[costs], PROFILES[profile], 500, None, seed).speed > 0.98 * plain


@pytest.mark.slow
@pytest.mark.parametrize("costs", COSTS)
def test_a_useless_drafter_costs_nothing_and_is_noticed(costs: str) -> None:
    outcome = simulate(COSTS[costs], PROFILES["zero"], 60000, None, 0)
    assert outcome.speed > 0.99 / COSTS[costs].rounds[0]
    assert useless(outcome.state)


def test_a_useful_drafter_is_not_called_useless() -> None:
    assert not useless(simulate(COSTS["E2B q4, fast memory"], PROFILES["low"], 3000, None, 0).state)
    assert not useless(State())


def test_wrong_prices_are_put_right() -> None:
    """Costs said that drafting is nearly free, and rounds take three times as long."""
    told = Costs((30.0, 31.0, 32.0, 33.0, 34.0, 35.0, 36.0, 37.0, 38.0))
    state, done, spent = State(), 0, 0.0
    random.seed(3)
    while done < 1500:
        if state.plan is None:
            state = replace(state, plan=next_plan(state, told, early_stop=False))
        depth = state.plan.length
        accepted = next((i for i in range(depth) if random.random() > 0.5), depth)
        took = 30.0 if depth == 0 else 3 * told.rounds[depth]
        spent, done = spent + took, done + accepted + 1
        state = observe(state, told, outcome(depth, accepted, *[0.5] * depth), took)
    assert spent < 1.1 * 30.0 * done


@given(
    costs=st.lists(st.floats(0.01, 1000), min_size=2, max_size=MAX_DEPTH + 1),
    rounds=st.lists(st.tuples(st.integers(0, MAX_DEPTH), st.floats(0, 1), st.floats(0.001, 1e4)), max_size=60),
)
def test_plans_are_always_possible(costs: list[float], rounds: list[tuple[int, float, float]]) -> None:
    prices, state = Costs(tuple(costs)), State()
    for drafted, share, milliseconds in rounds:
        plan = next_plan(state, prices)
        assert 0 <= plan.length <= prices.deepest
        assert len(plan.floors) in (0, plan.length)
        assert all(0 <= p <= 1 for p in (*plan.acceptance, *acceptance(state)))
        depth = min(drafted, prices.deepest)
        state = observe(state, prices, outcome(depth, int(share * depth), *[share] * depth), milliseconds)
    assert next_request(state).lost == 0


def seen(chances: Chances, rounds: int = 200) -> State:
    """The state after many rounds with that acceptance."""
    return simulate(COSTS["stairs"], lambda _: chances, rounds, 8, 0).state


SHARED = Costs((10.0, 11.0, 12.0), 0.0, ((2, (12.0, 14.0, 16.0)), (4, (16.0, 20.0, 24.0))))


def test_shared_drafts_go_where_they_are_accepted() -> None:
    good, bad = seen((0.95,) * 8), seen((0.05,) * 8)
    depths = [plan.length for plan in share_out([bad, good, bad, good], SHARED)]
    assert depths == [0, 2, 0, 2]
    assert [plan.length for plan in share_out([bad] * 4, SHARED)] == [0] * 4
    assert [plan.length for plan in share_out([good] * 4, SHARED)] == [2] * 4


def test_sequences_that_share_rounds_are_tried_again_after_a_while() -> None:
    bad = replace(seen((0.0,) * 8), plain_rounds=33)  # a drafted round costs a sixth more: 33 of them in all
    assert [plan.length for plan in share_out([bad] * 2, SHARED)] == [0, 0]
    bad = replace(bad, plain_rounds=34)
    (plan, other) = share_out([bad, seen((0.0,) * 8)], SHARED)
    assert (plan.length, other.length) == (1, 1)
    after = observe(replace(bad, plan=plan), SHARED, outcome(1, 0, 0.5), None)
    assert after.plan == Draft()
    assert after.plain_rounds == 0
    assert observe(after, SHARED, outcome(0, 0), None) is after


def test_wrong_prices_of_shared_rounds_are_put_right() -> None:
    """Measured, drafting does not pay; really, drafted rounds take 30 % less than that, and the machine is slower."""
    dear = Costs((10.0, 18.0), 0.0, ((4, (16.0, 30.0)),))
    state, drift = seen((0.7,) * 8), Drift()
    assert [plan.length for plan in share_out([state] * 4, dear, drift)] == [0] * 4
    for _ in range(10):  # a probe among plain rounds
        for _ in range(20):
            drift = observe_shared(drift, dear, [0] * 4, 0, 1.2 * 16)
        drift = observe_shared(drift, dear, [1] * 4, 3, 1.2 * 0.7 * 30)
    assert drift.speed == pytest.approx(math.log(1.2), abs=0.01)
    assert drift.drafted == pytest.approx(math.log(0.7), abs=0.02)
    assert [plan.length for plan in share_out([state] * 4, dear, drift)] == [1] * 4


def test_only_those_draft_that_gain() -> None:
    """One good drafter among four: its drafts alone cost 2 ms more and bring nearly two tokens."""
    good, bad = seen((0.95,) * 8), seen((0.02,) * 8)
    assert [plan.length for plan in share_out([bad, bad, good, bad], SHARED)] == [0, 0, 2, 0]


@pytest.mark.parametrize("confidence", [math.nan, math.inf, -1.0, 7.0, 0.0, 1.0])
def test_any_confidence_is_borne(confidence: float) -> None:
    state = observe(State(), SHARED, outcome(1, 1, confidence), 10.0)
    assert sum(state.sure_tried) == 1


def test_prices_of_shared_rounds_lie_between_measured_ones() -> None:
    assert shared_price(SHARED, 2, 1) == 14
    assert shared_price(SHARED, 3, 2) == 20
    assert shared_price(SHARED, 8, 0) == 24


def test_floors_say_when_the_next_draft_breaks_even() -> None:
    # A millisecond is worth one token. From depth 1, 2.1 ms buy half and a quarter of the line's chance; from depth 2,
    # 0.1 ms buys half of it.
    floors = stop_floors([10.0, 11.0, 13.0, 13.1], (0.5,) * 8, 1.0)
    assert floors[0] == pytest.approx(2.1 / 0.75)
    assert floors[1] == pytest.approx(0.1 / 0.5)
    assert floors[2] > 1  # nothing deeper

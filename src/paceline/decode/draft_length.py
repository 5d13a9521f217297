"""Adaptive draft length: the one with most tokens per millisecond, by measured costs and observed acceptance.

Costs are staircases and acceptance often rises with depth, so every length is evaluated; length 0 is plain decoding.
Within a round the drafter may stop early, when its confidence says that another token is not worth its cost.

Exploration: where plain decoding is best, a drafted round is probed occasionally, at a cost of at most half a percent;
old observations decay meanwhile, so that a success counts. While drafting pays, a plain round in fifty keeps the
comparison valid. A ledger records what drafting lost against plain decoding since the request began: at five tokens'
worth, only probes draft until it is paid back.

Pure functions: `next_plan`, `share_out` for sequences that share rounds, and `observe`. No clock, no model.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from operator import mul

from paceline.types import CONFIDENCE_BINS, Draft, Result

MAX_DEPTH = 8
KEEP = 1 - 1 / 32  # decay of observations per drafted round: about the last 32 count
KEEP_PLAIN = 1 - 1 / 16  # per plain round
KEEP_LONG = 1 - 1 / 512  # of the long-term average
PRIOR = 0.7  # acceptance before anything was observed, with the weight of PRIOR_ROUNDS
PRIOR_ROUNDS = 3.0
LONG_ROUNDS = 8.0  # weight of what was seen long ago
PROBE_SHARE = 0.005  # of the time, for probes
LEAST_PAUSE = 32.0  # rounds between them
MOST_LOST = 5.0  # plain tokens' worth of time
MOST_SAVED = 20.0  # gains that later losses are set against, likewise
PAYBACK = 0.01
PLAIN_PAUSE = 48  # rounds between plain ones while drafting pays: they tell what it is compared with
SPEED_RATE, DRIFT_RATE, CHANGE_RATE = 0.15, 0.07, 0.3  # how fast costs follow what rounds take
REPLAN, PLAIN_REPLAN, SHARED_REPLAN = 8, 16, 64  # rounds between plans: drafted, plain, and shared plain ones

Floats = tuple[float, ...]


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a whole round by its depth, 0 (plain decoding) to at most MAX_DEPTH, if it accepts nothing."""

    rounds: Floats
    token: float = 0.0  # added by each accepted token: sampling the next one, and its text
    shared: tuple[tuple[int, Floats], ...] = ()  # several sequences at once: how many, and `rounds` of them all

    @property
    def deepest(self) -> int:
        return len(self.rounds) - 1


@dataclass(frozen=True)
class State:
    """What a sequence's rounds have shown. Counts fade as new rounds come."""

    tried: Floats = (0.0,) * MAX_DEPTH  # drafted tokens verified at depth 1, 2, ...: those before them were accepted
    kept: Floats = (0.0,) * MAX_DEPTH  # of these, accepted
    tried_long: float = 0.0  # first drafts over a longer time
    kept_long: float = 0.0
    sure_tried: Floats = (0.0,) * CONFIDENCE_BINS  # the same by the drafter's confidence
    sure_kept: Floats = (0.0,) * CONFIDENCE_BINS
    speed: float = 0.0  # logarithm of what rounds cost now over what was measured
    drift: Floats = (0.0,) * (MAX_DEPTH + 1)  # what depth 0, 1, ... costs beyond that, likewise
    lost: float = 0.0  # milliseconds lost against plain decoding; below 0: gained
    plain_rounds: int = 0  # since the last drafted one
    fresh: bool = False  # a request just began: nothing is wrong with a probe
    drafted_rounds: int = 0  # since the last plain one
    drafted: int = 0
    accepted: int = 0
    plan: Draft | None = None  # in force until it is made anew


def acceptance(state: State) -> Floats:
    """Estimated chance of a draft at depth 1, 2, ... given that those before it were accepted.

    A depth that was seldom seen is taken to be like the one before it: acceptance often rises with depth, and a falling
    one would keep deep drafts from ever being seen.
    """
    estimate = (state.kept_long + PRIOR_ROUNDS * PRIOR) / (state.tried_long + PRIOR_ROUNDS)
    estimates, weight = [], LONG_ROUNDS
    old = KEEP_PLAIN ** min(state.plain_rounds, 1000)  # what was seen grows old while nothing is drafted
    for tried, kept in zip(state.tried, state.kept, strict=True):
        estimate = (old * kept + weight * estimate) / (old * tried + weight)
        estimates.append(estimate)
        weight = PRIOR_ROUNDS
    return tuple(estimates)


def next_plan(state: State, costs: Costs, early_stop: bool = True) -> Draft:
    """The plan of the next round.

    Args:
        state: what was observed.
        costs: what was measured.
        early_stop: whether the backend can stop a round by the drafter's confidence.
    """
    prices = current_prices(state, costs)
    chance = acceptance(state)
    expected, chance_so_far = [1.0], 1.0
    for p in chance[: costs.deepest]:
        chance_so_far *= p
        expected.append(expected[-1] + chance_so_far)
    token = costs.token
    rates = [e / (price + token * (e - 1)) for e, price in zip(expected, prices, strict=True)]
    best = max(range(len(rates)), key=rates.__getitem__)
    plain = prices[0] * math.exp(state.speed)
    if best == 0 or state.lost > MOST_LOST * plain:
        probe = max(range(1, len(rates)), key=rates.__getitem__, default=0)
        pause = max(LEAST_PAUSE, (prices[probe] / prices[0] - 1) / PROBE_SHARE) if probe else math.inf
        return Draft(length=probe if state.fresh or state.plain_rounds >= pause else 0)
    if state.drafted_rounds >= min(PLAIN_PAUSE, 8 + state.drafted / 8):
        return Draft(length=0)
    if not early_stop:
        return Draft(length=best)
    worth = rates[best] / max(0.1, 1 - rates[best] * token)  # of a millisecond, in tokens that must still be sampled
    floors = stop_floors(prices, chance, worth)
    depth = max(best, next((j for j, floor in enumerate(floors, start=1) if floor > 1), costs.deepest))
    return Draft(length=depth, floors=floors[:depth], acceptance=confidence_chances(state))


@dataclass(frozen=True)
class Drift:
    """What rounds that sequences share take beyond what was measured, as logarithms."""

    speed: float = 0.0  # all of them
    drafted: float = 0.0  # those with drafts, beyond that


def share_out(states: Sequence[State], costs: Costs, drift: Drift = Drift()) -> list[Draft]:
    """The plans of sequences that share a round: those draft whose drafts are most likely to be accepted.

    Args:
        states: what was observed of each.
        costs: what was measured.
        drift: how shared rounds differ from that.

    For each depth, sequences are taken in the order of what they gain by it; of all depths and numbers of sequences
    that which yields most tokens per millisecond is chosen.
    """
    count, plain = len(states), shared_price(costs, len(states), 0)
    dearer = math.exp(drift.drafted)
    gains = [list(accumulate(accumulate(acceptance(state)[: costs.deepest], mul))) for state in states]
    best, depths = count / plain, [0] * count
    for depth, extras in enumerate(_extras(costs, count), start=1):
        order = sorted(range(count), key=lambda i, depth=depth: -gains[i][depth - 1])  # type: ignore[misc]
        gained = 0.0
        for drafting, extra in enumerate(extras, start=1):
            gained += gains[order[drafting - 1]][depth - 1]
            rate = (count + gained) / ((plain + extra) * dearer + gained * costs.token)
            if rate > best:
                chosen = order[:drafting]
                best, depths = rate, [depth * (i in chosen) for i in range(count)]
    pause = max(LEAST_PAUSE, _extras(costs, count)[0][-1] / plain / PROBE_SHARE)
    if not any(depths) and max(state.plain_rounds for state in states) >= pause:
        return [Draft(length=1)] * count  # a probe of all at once: that tells most for its time
    return [Draft(length=depth) for depth in depths]


def observe_shared(drift: Drift, costs: Costs, depths: Sequence[int], accepted: int, milliseconds: float) -> Drift:
    """What a round of several sequences adds: `depths` drafted tokens each, `accepted` of all."""
    count, drafting = len(depths), sum(depth > 0 for depth in depths)
    deepest = min(max(depths), costs.deepest)
    price = shared_price(costs, count, 0)
    if drafting:
        price += _extras(costs, count)[deepest - 1][drafting - 1]
        price = price * math.exp(drift.drafted) + accepted * costs.token
    error = math.log(max(milliseconds, 1e-6) / price) - drift.speed
    error = min(0.7, max(-0.7, error))
    if drafting:
        return Drift(drift.speed, drift.drafted + CHANGE_RATE * error)
    return Drift(drift.speed + SPEED_RATE * error, drift.drafted)


@lru_cache(maxsize=64)
def _extras(costs: Costs, count: int) -> list[list[float]]:
    """Milliseconds that drafting adds to a plain round of `count` sequences: by depth, and by how many draft.

    Some of them draft as long as they would by themselves; but their rows are at least as dear as among all.
    """

    def extra(drafting: int, depth: int) -> float:
        return shared_price(costs, drafting, depth) - shared_price(costs, drafting, 0)

    return [
        [max(1e-6, extra(n, depth), extra(count, depth) * n / count) for n in range(1, count + 1)]
        for depth in range(1, costs.deepest + 1)
    ]


def shared_price(costs: Costs, count: int, depth: int) -> float:
    """Milliseconds of a round of several sequences, interpolated between measured numbers of sequences."""
    tables = ((1, costs.rounds), *costs.shared)
    i = min(max(1, bisect_left([n for n, _ in tables], count)), len(tables) - 1)
    (few, low), (many, high) = tables[i - 1], tables[i]
    return max(1e-6, low[depth] + (high[depth] - low[depth]) * (count - few) / (many - few))


def current_prices(state: State, costs: Costs) -> list[float]:
    """Costs of rounds by depth, corrected by what rounds took compared with each other."""
    return [ms * math.exp(drift) for ms, drift in zip(costs.rounds, state.drift, strict=False)]


def stop_floors(prices: list[float], chance: Floats, rate: float) -> Floats:
    """For each depth, the chance of the draft so far below which another token is not worth its cost.

    Drafting on from depth j to m costs prices[m] - prices[j], in which the round's rate would yield that many tokens;
    it gains the draft's chance times the tokens that may follow. The floor is where the best m breaks even.
    """
    floors = []
    for j in range(1, len(prices)):
        floor, gain, share = math.inf, 0.0, 1.0
        for m in range(j + 1, len(prices)):
            share *= chance[m - 1]
            gain += share
            floor = min(floor, rate * max(0.0, prices[m] - prices[j]) / max(gain, 1e-9))
        floors.append(min(floor, 1e9))
    return tuple(floors)


def confidence_chances(state: State) -> Floats:
    """Chance of a draft by the drafter's confidence: at first a guess that it means what it says, roughly."""
    return tuple(
        (kept + PRIOR_ROUNDS * (0.2 + 0.8 * (i + 0.5) / CONFIDENCE_BINS)) / (tried + PRIOR_ROUNDS)
        for i, (tried, kept) in enumerate(zip(state.sure_tried, state.sure_kept, strict=True))
    )


def confidence_bin(confidence: float) -> int:
    """Which of CONFIDENCE_BINS a confidence falls into; the lowest for what is none."""
    return min(CONFIDENCE_BINS - 1, int(confidence * CONFIDENCE_BINS)) if 0 <= confidence <= 1 else 0


def observe(state: State, costs: Costs, result: Result, milliseconds: float | None) -> State:
    """What a round adds.

    Args:
        state: what was observed before.
        costs: what was measured.
        result: what was drafted and accepted.
        milliseconds: the round's time; None for a round shared with others, which says nothing about costs.
    """
    depth, accepted = min(len(result.drafted), costs.deepest), result.accepted
    if milliseconds is None:
        return _observe_shared_round(state, result)
    expected = costs.rounds[depth] * math.exp(state.speed + state.drift[depth]) + accepted * costs.token
    error = min(0.7, max(-0.7, math.log(max(milliseconds, 1e-6) / expected)))
    # After a change between plain and drafted rounds the machine is as fast as before: an error is in the costs.
    changed = state.drafted_rounds > 0 if not depth else state.plain_rounds > 0
    speed = state.speed + (0.0 if changed else SPEED_RATE * error)
    drift = state.drift[depth] + (CHANGE_RATE if changed else DRIFT_RATE) * error
    plain = costs.rounds[0] * math.exp(speed + (state.drift[0] if depth else drift))
    if depth:
        loss = min(milliseconds, 2 * expected) - (accepted + 1) * plain  # outliers count in part
        lost = max(-MOST_SAVED * plain, state.lost + loss)
    else:
        lost = min(state.lost, max(0.0, state.lost - PAYBACK * plain))
    aged, plain_rounds = state.plain_rounds, 0 if depth else state.plain_rounds + 1
    drafted_rounds = state.drafted_rounds + 1 if depth else 0
    if depth:
        replan = drafted_rounds == 1 or drafted_rounds % REPLAN == 0  # right after a probe
    else:
        replan = plain_rounds == 1 or plain_rounds % PLAIN_REPLAN == 0
    state = replace(
        state,
        speed=speed,
        drift=_with(state.drift, depth, drift),
        lost=lost,
        plain_rounds=plain_rounds,
        fresh=False,
        drafted_rounds=drafted_rounds,
        drafted=state.drafted + depth,
        accepted=state.accepted + accepted,
        plan=None if replan else state.plan,
    )
    return _count_acceptance(state, result, aged) if depth else state


def _observe_shared_round(state: State, result: Result) -> State:
    if not result.drafted:
        return state  # plain rounds are counted where drafts are shared out
    aged = state.plain_rounds
    state = replace(
        state,
        plain_rounds=0,
        drafted=state.drafted + len(result.drafted),
        accepted=state.accepted + result.accepted,
        plan=Draft(length=0) if aged >= LEAST_PAUSE else state.plan,  # a probe is one round
    )
    return _count_acceptance(state, result, aged)


def next_request(state: State) -> State:
    """What a sequence starts with that follows another: other text, so little of the counts, and nothing lost yet."""
    old = 0.25 * KEEP_PLAIN ** min(state.plain_rounds, 1000)
    tried, kept = tuple(old * n for n in state.tried), tuple(old * n for n in state.kept)
    return replace(state, tried=tried, kept=kept, lost=0.0, plain_rounds=0, fresh=True, plan=None)


def _count_acceptance(state: State, result: Result, plain_rounds: int) -> State:
    old = KEEP_PLAIN ** min(plain_rounds, 1000)
    tried, kept = [old * n for n in state.tried], [old * n for n in state.kept]
    sure_tried, sure_kept = list(state.sure_tried), list(state.sure_kept)
    for i in range(min(result.accepted + 1, len(result.drafted))):
        right = float(i < result.accepted)
        if i < len(tried):
            tried[i], kept[i] = KEEP * tried[i] + 1, KEEP * kept[i] + right
        if result.confidence:
            b = confidence_bin(result.confidence[i])
            sure_tried[b], sure_kept[b] = KEEP * sure_tried[b] + 1, KEEP * sure_kept[b] + right
    return replace(
        state,
        tried=tuple(tried),
        kept=tuple(kept),
        tried_long=KEEP_LONG * state.tried_long + 1,
        kept_long=KEEP_LONG * state.kept_long + float(result.accepted > 0),
        sure_tried=tuple(sure_tried),
        sure_kept=tuple(sure_kept),
    )


def useless(state: State) -> bool:
    """Whether hardly any draft was ever accepted, which hints at a mistake rather than at hard text."""
    return state.drafted >= 100 and state.accepted < 0.02 * state.drafted


def _with(values: Floats, index: int, value: float) -> Floats:
    return (*values[:index], value, *values[index + 1 :])

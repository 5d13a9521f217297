"""Drafting always pays: simulated rounds with measured costs and made-up acceptance; and what control must bear."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.decode.draft_length import MAX_DEPTH
from paceline.engine.draft_control import FIRST_CREDIT, DraftControl
from paceline.engine.proposers import PromptLookup
from paceline.engine.sequence import Sequence
from paceline.types import CONFIDENCE_BINS, Draft, Result
from tests.fixtures.backends import unplaced
from tests.fixtures.scripted_backend import ScriptedBackend

Costs = tuple[float, ...]
# Milliseconds of rounds of 0 to 8 drafted tokens: measured ones, and two made up to be hard.
COSTS: dict[str, Costs] = {
    "E2B q4, fast memory": (28.7, 28.7, 29.8, 30.9, 34.0, 38.0, 42.0, 44.5, 49.8),
    "E2B q4, slow memory": (44.0, 45.3, 48.4, 52.4, 57.2, 62.5, 67.3, 72.6, 83.6),
    "E2B q4, AVX2, slow memory": (57.7, 61.6, 72.4, 93.1, 110.0, 128.5, 165.2, 187.0, 210.6),
    "E2B bf16": (144.0, 144.6, 145.4, 146.9, 151.2, 155.5, 161.3, 167.0, 273.6),
    "tiny-python": (0.323, 0.421, 0.476, 0.512, 0.58, 0.639, 0.697, 0.749, 0.952),
    "experts": (101.0, 149.0, 190.0, 227.0, 260.0, 290.0, 320.0, 350.0, 380.0),
    "experts, steep": (60.0, 96.0, 120.0, 141.0, 159.0, 174.0, 186.0, 198.0, 210.0),
    "stairs": (10.0, 10.2, 10.4, 10.6, 19.0, 19.2, 19.4, 19.6, 29.0),
}
Chances = tuple[float, ...]
# Chance of the draft at depth 1, 2, ... given those before it, at the n-th token.
PROFILES: dict[str, Callable[[int], Chances]] = {
    "rising": lambda _: (0.73, 0.76, 0.79, 0.82, 0.83, 0.84, 0.85, 0.86),
    "falling": lambda _: (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    "three good": lambda _: (0.8, 0.81, 0.77, 0, 0, 0, 0, 0),
    "three fair": lambda _: (0.5, 0.6, 0.67, 0, 0, 0, 0, 0),
    "two poor": lambda _: (0.3, 0.33, 0, 0, 0, 0, 0, 0),
    "even": lambda _: (0.6,) * 8,
    "high": lambda _: (0.95,) * 8,
    "low": lambda _: (0.25,) + (0.2,) * 7,
    "zero": lambda _: (0.0,) * 8,
    "bursts": lambda n: (0.95,) * 8 if n // 150 % 2 == 0 else (0.05,) * 8,
}


@dataclass
class NoLookup(DraftControl):
    """The drafter alone."""

    def guess(self, sequence: Sequence, lookup: PromptLookup, most: int) -> tuple[list[int], list[float]]:
        return [], []


@dataclass
class Simulation:
    """Rounds with true costs and made-up acceptance. What control sees is a machine whose speed wanders by some
    per cent, with noise and now and then something else that runs; `spent` is true.

    `sure`: the drafter's confidence tells good drafts from bad ones to some degree; else it is the same for all.
    """

    costs: Costs
    profile: Callable[[int], Chances]
    seed: int
    sure: bool = False
    done: int = 0
    spent: float = 0.0
    drift: float = 0.0  # logarithm
    depths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance, self._noise = random.Random(self.seed), random.Random(~self.seed)

    def round(self, plan: Draft) -> tuple[Result, float]:
        right, confidence, line = [], [], 1.0
        for p in self.profile(self.done)[: plan.length]:
            right.append(self._chance.random() < p)
            beta = (6, 2) if right[-1] else (2, 3)
            confidence.append(self._chance.betavariate(*beta) if self.sure else p)
            if plan.floors:
                line *= plan.acceptance[min(CONFIDENCE_BINS - 1, int(confidence[-1] * CONFIDENCE_BINS))]
                if line < plan.floors[len(right) - 1]:
                    break
        accepted = [*right, False].index(False)
        took = self.costs[len(right)]
        self.spent, self.done = self.spent + took, self.done + accepted + 1
        self.depths.append(len(right))
        slow = 1.5 if self._noise.random() < 0.02 else 1
        self.drift = 0.98 * self.drift + self._noise.gauss(0, 0.015)
        seen = took * slow * math.exp(self.drift + self._noise.gauss(0, 0.04))
        return Result((0,) * (accepted + 1), (0,) * len(right), tuple(confidence)), seen / 1e3

    def run(self, tokens: int, depth: int | None) -> float:
        """Tokens a millisecond, at a fixed depth or at control's."""
        control, sequence = NoLookup(True, True), adaptive()
        control.begin(sequence)
        while self.done < tokens:
            control.prepare([sequence])
            result, seconds = self.round(control.propose(sequence, 15) if depth is None else Draft(length=depth))
            control.observe([(sequence, result)], seconds)
        return self.done / self.spent


def adaptive(draft_tokens: int | None = None) -> Sequence:
    """A sequence after its prefill."""
    sequence = unplaced(ScriptedBackend(), [1, 2], draft_tokens=draft_tokens)
    sequence.tokens.append(3)
    return sequence


@cache
def best_fixed(costs: str, profile: str) -> float:
    def speed(depth: int) -> float:
        return sum(Simulation(COSTS[costs], PROFILES[profile], seed).run(2000, depth) for seed in range(3)) / 3

    return max(speed(depth) for depth in range(MAX_DEPTH + 1))


@pytest.mark.slow
@pytest.mark.parametrize("sure", [False, True], ids=["even confidence", "telling confidence"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("costs", COSTS)
def test_near_the_best_fixed_depth(costs: str, profile: str, sure: bool) -> None:
    """Within 6 % over 2,000 tokens, what is learned at first included; on average over all cases it is faster."""
    speeds = [Simulation(COSTS[costs], PROFILES[profile], seed, sure).run(2000, None) for seed in range(3)]
    assert sum(speeds) / 3 > 0.94 * best_fixed(costs, profile)


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("costs", COSTS)
def test_never_slower_than_plain_decoding(costs: str, profile: str) -> None:
    """Over 500 tokens, from a cold start, in every one of many runs."""
    for seed in range(4):
        assert Simulation(COSTS[costs], PROFILES[profile], seed).run(500, None) > 0.98 / COSTS[costs][0]


@pytest.mark.slow
@pytest.mark.parametrize("costs", COSTS)
def test_a_useless_drafter_costs_little_in_a_short_text(costs: str) -> None:
    for seed in range(12):
        assert Simulation(COSTS[costs], PROFILES["zero"], seed).run(64, None) > 0.95 / COSTS[costs][0]


@pytest.mark.slow
@pytest.mark.parametrize("costs", COSTS)
def test_a_useless_drafter_costs_a_percent_of_a_long_one(costs: str) -> None:
    assert Simulation(COSTS[costs], PROFILES["zero"], 0).run(20000, None) > 0.99 / COSTS[costs][0]


def shared(rounds: int, plain: float, row: float, *chances: float, stair: float = 0) -> list[list[int]]:
    """Draft lengths of sequences that decode together: their first drafts are accepted with these chances.

    Milliseconds: of a plain step, what each drafted row adds, and what the first one adds besides.
    """
    dice, control = random.Random(0), NoLookup(True, False)
    sequences = [adaptive() for _ in chances]
    for sequence in sequences:
        control.begin(sequence)
    lengths = []
    for _ in range(rounds):
        control.prepare(sequences)
        lengths.append([control.propose(sequence, 15).length for sequence in sequences])
        results = []
        for length, chance in zip(lengths[-1], chances, strict=True):
            accepted = next((i for i in range(length) if dice.random() >= chance), length)
            results.append(Result((0,) * (accepted + 1), (0,) * length, (0.5,) * length))
        ms = plain + row * sum(lengths[-1]) + (stair if any(lengths[-1]) else 0)
        control.observe(list(zip(sequences, results, strict=True)), ms / 1e3)
    return lengths


def test_a_fixed_length_beside_it_earns_no_credit() -> None:
    """Steps without a plain one before them tell nothing of what drafting gains."""
    control, fixed, one = NoLookup(True, False), adaptive(4), adaptive()
    control.begin(one)
    for _ in range(60):
        control.prepare([fixed, one])
        length = control.propose(one, 15).length
        results = [(fixed, Result((0,) * 2, (0,) * 4, (0.5,) * 4)), (one, Result((0,), (0,) * length, (0.5,) * length))]
        control.observe(results, 0.06)
    assert control._costs[2].credit < 2


def test_those_draft_whose_drafts_are_accepted() -> None:
    settled = shared(200, 10, 1.5, 0.95, 0.02, 0.95, 0.02)[-60:]
    by_sequence = [sum(lengths) for lengths in zip(*settled, strict=True)]
    assert min(by_sequence[0], by_sequence[2]) > 10 * max(by_sequence[1], by_sequence[3], 1)


def test_nobody_drafts_where_rows_are_dear() -> None:
    drafted = sum(map(sum, shared(300, 10, 12.0, 0.5, 0.5)))
    assert drafted < 20
    assert sum(map(sum, shared(300, 10, 0.1, 0.5, 0.5))) > 300


def test_where_the_first_row_is_dear_tries_are_rare_and_made_together() -> None:
    lengths = shared(400, 10, 0.2, *[0.2] * 8, stair=6)
    tries = [sum(map(bool, step)) for step in lengths[50:] if any(step)]
    assert 0 < len(tries) < 50
    assert sum(tries) > 4 * len(tries)


def test_what_one_sequence_gains_is_not_spent_by_several() -> None:
    control, one, other = NoLookup(True, False), adaptive(), adaptive()
    control.begin(one)
    for _ in range(60):
        control.prepare([one])
        length = control.propose(one, 15).length
        control.observe([(one, Result((0,) * (length + 1), (0,) * length, (0.9,) * length))], 0.01 + 0.0005 * length)
    assert control._costs[1].credit > 5
    control.begin(other)
    control.prepare([one, other])
    assert control._costs[2].credit == FIRST_CREDIT


def test_a_try_is_due_again_after_a_while() -> None:
    """Text changes, and so does the machine."""
    depths = Simulation(COSTS["experts"], lambda n: (0.0,) * 8 if n < 400 else (0.95,) * 8, 0)
    depths.run(1200, None)
    assert sum(depths.depths[200:400]) < 30
    assert sum(depths.depths[-50:]) > 100


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 15), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e3)), max_size=60),
)
def test_plans_are_always_possible(stops_early: bool, rounds: list[tuple[int, float, float, float]]) -> None:
    control, sequence = DraftControl(True, stops_early), adaptive()
    control.begin(sequence)
    for most, share, confidence, seconds in rounds:
        control.prepare([sequence])
        plan = control.propose(sequence, most)
        assert 0 <= plan.length <= min(most, MAX_DEPTH)
        assert len(plan.floors) in (0, plan.length)
        assert len(plan.tokens) <= most
        drafted = plan.length or len(plan.tokens)
        result = Result((3,) * (int(share * drafted) + 1), (3,) * drafted, (confidence,) * plan.length)
        sequence.tokens += result.sampled
        control.observe([(sequence, result)], seconds)
        assert all(state.value == state.value for state in control._states.values())  # none is NaN


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_fixed_length_is_the_drafters(most: int) -> None:
    fixed = adaptive(4)
    assert DraftControl(True, True).propose(fixed, most) == Draft(length=min(4, most))
    assert DraftControl(False, True).propose(fixed, most) is None


def test_without_a_drafter_repeats_are_drafted() -> None:
    control, sequence = DraftControl(False, False), adaptive()
    text = [5, 6, 7, 8, 9, 10] * 3
    sequence.tokens += text
    control.begin(sequence)
    for _ in range(4):
        control.prepare([sequence])
        draft = control.propose(sequence, 15)
        assert draft.length == 0
        control.observe([(sequence, Result((0,) * (1 + len(draft.tokens)), draft.tokens))], 0.01)
    assert draft.tokens[:6] == (5, 6, 7, 8, 9, 10)


def test_what_a_sequence_learned_is_kept_at_its_end() -> None:
    control, sequence = DraftControl(True, False), adaptive()
    control.begin(sequence)
    control.prepare([sequence])
    control.observe([(sequence, Result((1,), (2,), (0.5,)))], 0.01)
    assert control.learned.tried_long == 0
    control.finish(sequence)
    assert control.learned.tried_long == 1
    assert control._states == {}
    control.finish(sequence)  # may be told twice


def together(
    control: DraftControl, sequences: list[Sequence], rounds: int, chance: Callable[[Sequence, int], float], row: float
) -> dict[Sequence, list[int]]:
    """Rounds of 10 ms and `row` ms for each drafted token; drafts are accepted by chance. What was drafted."""
    dice = random.Random(0)
    lengths: dict[Sequence, list[int]] = {s: [] for s in sequences}
    for sequence in sequences:
        control.begin(sequence)
    for number in range(rounds):
        control.prepare(sequences)
        results = []
        for s in sequences:
            draft = control.propose(s, 15) if s.draft_tokens != 0 else Draft()
            count = draft.length + len(draft.tokens)
            lengths[s].append(draft.length)
            p = chance(s, number)
            accepted = next((i for i in range(count) if dice.random() >= p), count)
            results.append(Result((0,) * (accepted + 1), (0,) * count, (0.5,) * draft.length))
        ms = 10 + row * sum(len(result.drafted) for result in results)
        own = [(s, r) for s, r in zip(sequences, results, strict=True) if s.draft_tokens != 0]
        control.observe(own, ms / 1e3)
    return lengths


def test_a_sequence_drafts_beside_one_that_does_not() -> None:
    plain, drafting = adaptive(0), adaptive()
    lengths = together(NoLookup(True, False), [plain, drafting], 200, lambda *_: 0.95, 0.2)
    assert sum(lengths[drafting][-50:]) > 150
    assert not any(lengths[plain])


def test_fixed_lengths_teach_nothing() -> None:
    """They would be taken for steps of as many sequences as were adaptive last."""
    control = NoLookup(True, False)
    together(control, [adaptive()], 20, lambda *_: 0.5, 0.2)
    before = control._costs[1].observed
    together(control, [adaptive(2), adaptive(3)], 20, lambda *_: 0.5, 0.2)
    assert control._costs.keys() == {1}
    assert control._costs[1].observed == before


def test_a_guess_beside_the_drafter_does_not_keep_it_short() -> None:
    class Guessing(NoLookup):
        def guess(self, s: Sequence, lookup: PromptLookup, most: int) -> tuple[list[int], list[float]]:
            return ([0] * 4, [0.9] * 4) if s is guessing else ([], [])

    guessing, drafting = adaptive(), adaptive()
    lengths = together(Guessing(True, False), [guessing, drafting], 200, lambda *_: 0.9, 0.2)
    assert max(lengths[drafting]) > 3


def test_a_sequence_is_tried_again_while_others_draft() -> None:
    steady, late = adaptive(), adaptive()
    lengths = together(
        NoLookup(True, False), [steady, late], 900, lambda s, n: 0.95 if s is steady or n > 300 else 0.0, 1.0
    )
    assert sum(lengths[late][250:300]) < 10
    assert sum(lengths[late][-100:]) > 100


@pytest.mark.parametrize("has_drafter", [False, True])
def test_a_slow_first_round_is_forgotten(has_drafter: bool) -> None:
    """Caches are cold; plain decoding would look slow for long, and everything else good."""
    control, sequence, dice = DraftControl(has_drafter, False), adaptive(), random.Random(0)
    control.guess = lambda *_: ([1] * 15, [0.3] * 15)
    control.begin(sequence)
    spent = done = 0.0
    for number in range(500):
        control.prepare([sequence])
        draft = control.propose(sequence, 15)
        count = draft.length + len(draft.tokens)
        accepted = next((i for i in range(count) if dice.random() >= 0.3), count)
        ms = 1 + 0.3 * count
        spent, done = spent + ms, done + accepted + 1
        result = Result((0,) * (accepted + 1), (0,) * count, (0.5,) * draft.length)
        control.observe([(sequence, result)], (4 * ms if number == 0 else ms) / 1e3)
    assert done / spent > 0.96


def test_steps_that_hold_prefill_are_no_time_for_tries() -> None:
    """Nothing is learned from them, so that a try would be due in each of them."""
    control, sequence = NoLookup(True, False), adaptive()
    together(control, [sequence], 100, lambda *_: 0.95, 0.2)
    control._costs[1].plain_at = -10000  # a plain round is due
    lengths = []
    for _ in range(30):
        control.prepare([sequence])
        lengths.append(control.propose(sequence, 15).length)
        result = Result((0,) * (lengths[-1] + 1), (0,) * lengths[-1], (0.5,) * lengths[-1])
        control.observe([(sequence, result)], None)
    assert sum(length == 0 for length in lengths) < 3

"""Who drafts in a round, and how far: what yields most tokens per millisecond, plain decoding included.

Costs are learned from the steps (`cost_model`), chances from what was accepted (`decode.draft_length`, `PromptLookup`).
Within a round the drafter may stop early, when its confidence says that another token is not worth its cost. What
prompt lookup finds is taken where it is worth more.

Exploration is bounded by credit, in plain rounds: drafting spends what it loses against plain decoding, and earns what
it gains. Where plain decoding is best, a drafted round is tried occasionally, and the other way around.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from paceline.decode.draft_length import MAX_DEPTH, Acceptance, expected_gains, stop_floors
from paceline.engine.acceptance_monitor import AcceptanceMonitor
from paceline.engine.cost_model import StepCosts
from paceline.engine.proposers import NOTHING_TRIED, PromptLookup, Proposer, Rounds
from paceline.engine.sequence import Sequence
from paceline.types import NO_DRAFT, Draft

FIRST_CREDIT = 1.0  # plain rounds that drafting may lose before it has gained anything: 2 % of 60 tokens
CREDIT_SHARE = 0.008  # of the rounds since then, in addition
MOST_CREDIT = 20.0  # gains that later losses are set against
FIRST_PLAIN = 2  # rounds without drafts at first, which the others are compared with
LONGEST_PAUSE = 32  # rounds from one try of the drafter to the next where it does not pay
PLAIN_PAUSE, LONGEST_PLAIN_PAUSE = 32, 512  # rounds between plain ones: the more drafting gains, the surer it is
LEAST_CHANCE = 0.6  # of one more token, for a length that was not seen to be tried
LEAST_GAIN = 1.02  # over plain decoding: less may be a mistake about the machine
FAR = 0.2  # that much slower than plain decoding is not tried any sooner
UNLIKELY = 0.1  # a guess is not looked at any further
UNSURE = 2.0  # a length beyond those seen may add that many times what is expected
REPLAN_MS, MOST_ROUNDS, FEW_ROUNDS = 12.0, 12, 3  # a plan serves for that long, and no more rounds; with little credit


@dataclass
class _State:
    """What is known of a sequence."""

    acceptance: Acceptance
    lookup: PromptLookup
    rounds: int = 0  # with the drafter
    plan: Draft = NO_DRAFT
    value: float = 0.0  # of the plan: tokens beyond those that its time would yield otherwise


@dataclass
class DraftControl(Proposer):
    """Drafts with the backend's drafter and by prompt lookup, as far as it pays; or so many tokens as a sequence says.

    Args:
        has_drafter: whether the backend has one.
        stops_early: whether it can stop by its confidence.
        monitor: told what becomes of first drafts.
    """

    has_drafter: bool
    stops_early: bool
    monitor: AcceptanceMonitor = field(default_factory=AcceptanceMonitor)
    learned: Acceptance = field(default_factory=Acceptance)  # from sequences that have ended
    _lookup_rates: Items[tuple[float, float]] = NOTHING_TRIED  # likewise
    _states: dict[Sequence, _State] = field(default_factory=dict)  # of sequences with an adaptive draft length
    _costs: dict[int, StepCosts] = field(default_factory=dict)  # by the number of sequences
    _current: StepCosts | None = None  # of those that decode; None if none of them is adaptive
    _blind: bool = False  # the last step's time says nothing of its rounds
    _planned: list[Sequence] = field(default_factory=list)  # for whom plans were made
    _rounds_left: int = 0  # until they are made anew
    _rate: float = 0.0  # tokens a millisecond that they promise
    _given_costs: list[float] = field(default_factory=list)  # milliseconds that 1, 2, ... tokens of a guess add

    def begin(self, sequence: Sequence) -> None:
        if sequence.draft_tokens is None:
            lookup = PromptLookup(self._lookup_rates)
            lookup.read(sequence.tokens, sequence.prompt_length)
            self._states[sequence] = _State(self.learned.for_next_text(), lookup)

    def prepare(self, sequences: Items[Sequence]) -> None:
        self._rounds_left -= 1
        if self._rounds_left > 0 and self._planned == sequences:
            return
        self._planned = [*sequences]
        states = [self._states[s] for s in sequences if s in self._states]
        self._current = None
        if states:
            self._current = self._costs.setdefault(len(sequences), StepCosts(len(sequences), FIRST_CREDIT))
            self._plan(states, self._current)

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        if sequence.draft_tokens is not None:
            return Draft(length=min(sequence.draft_tokens, most)) if self.has_drafter else None
        state = self._states[sequence]
        guess, chances = self.guess(sequence, state.lookup, most)
        if guess and (length := self._worth_of(chances, state.value)):
            return Draft(tuple(guess[:length]))
        plan = state.plan
        return plan if plan.length <= most else Draft((), most, plan.floors[:most], plan.acceptance)

    def _worth_of(self, chances: list[float], value: float) -> int:
        """How many tokens of a guess are worth most; 0 if none is worth more than `value`."""
        costs = self._current
        if not costs or costs.plain_seen < FIRST_PLAIN:
            return 0
        length, chance, gain = 0, 1.0, 0.0
        for i, p in enumerate(chances):
            chance *= p
            gain += chance
            if i == len(self._given_costs):  # few rounds have a guess
                self._given_costs.append(costs.price(i + 1, given=True) - costs.plain)
            worth = gain - self._rate * self._given_costs[i]
            if worth > value:
                value, length = worth, i + 1
            elif chance < UNLIKELY:
                break
        return length

    def guess(self, sequence: Sequence, lookup: PromptLookup, most: int) -> tuple[list[int], list[float]]:
        """What prompt lookup finds, and the chance of each token given those before it."""
        lookup.read(sequence.tokens, sequence.prompt_length)
        return lookup.guess(sequence.tokens, most)

    def observe(self, rounds: Rounds, seconds: float | None) -> None:
        drafted = rows = accepted = 0
        costs, self._blind = self._current, seconds is None
        if costs is None:
            return
        for sequence, result in rounds:
            length = len(result.drafted)
            rows, accepted = rows + length, accepted + result.accepted
            if result.confidence:
                drafted = max(drafted, length)
            state = self._states.get(sequence)
            if state and result.confidence:
                state.rounds += 1
                state.acceptance.observe(result)
                self.monitor.observe(sequence, result.accepted > 0)
            elif state:
                state.acceptance.rested += 1
        if seconds is None or not rounds:
            return
        ms, made, plain = seconds * 1e3, 1 + accepted / costs.count, costs.plain
        usual = costs.observe(drafted, rows, ms)
        if drafted and costs.plain_seen:  # prompt lookup is observed without being tried
            costs.credit += made - usual / plain
            if costs.credit < FIRST_CREDIT:
                self._rounds_left = min(self._rounds_left, FEW_ROUNDS)
        costs.credit = max(-FIRST_CREDIT, min(MOST_CREDIT, costs.credit + CREDIT_SHARE * made))

    def _plan(self, states: list[_State], costs: StepCosts) -> None:
        """Decide how far each of the sequences drafts in the next rounds."""
        count, plain, alone = costs.count, costs.plain, len(states) == costs.count == 1
        chances = [state.acceptance.chances() for state in states]
        gains = [expected_gains(p) for p in chances]
        prices, rates, drafts = [plain], [count / plain if plain else 0.0], [[0] * len(states)]
        known = costs.plain_seen >= FIRST_PLAIN
        for length in range(1, min(MAX_DEPTH, 2 * costs.longest + 1) + 1 if known and self.has_drafter else 1):
            depths = [length]
            if not alone:  # each as far as its gain is worth the time of its rows
                worth = max(rates) * (costs.price(count * length) - plain) / (count * length)
                depths = [max(range(length + 1), key=lambda d, gain=gain: gain[d] - worth * d) for gain in gains]  # type: ignore[misc]
            price = costs.price(sum(depths))
            if (price / plain - 1) * (UNSURE if length > costs.longest else 1) > costs.credit:
                break
            prices.append(price)
            rates.append((count + sum(gain[d] for gain, d in zip(gains, depths, strict=True))) / price)
            drafts.append(depths)
        best = max(range(len(rates)), key=rates.__getitem__)
        best = best if rates[best] > LEAST_GAIN * rates[0] else 0
        self._rate, self._given_costs = rates[best], []
        rests = [self._pause(s, rates) - s.acceptance.rested for s in states] if known else []  # rounds until a try
        tried = None if self._blind or not known else self._to_try(rests, costs, best, rates, drafts, chances)
        if tried or not known:
            self._rounds_left = 1
        elif best:
            self._rounds_left = min(MOST_ROUNDS, 1 + int(REPLAN_MS / plain))
        else:  # what is due is put off if credit does not allow it yet
            self._rounds_left = min(rests) if min(rests) > 0 else LONGEST_PAUSE // 4
        for state, depth, gain in zip(states, tried or drafts[best], gains, strict=True):
            worth = gain[depth] - self._rate * (costs.price(depth) - plain)
            state.plan, state.value = Draft(length=depth), math.inf if tried else worth  # no guess instead of a try
        if alone and best and self.stops_early and not tried:
            floors = stop_floors(prices, chances[0], self._rate)
            best = max(best, next((j for j, floor in enumerate(floors, start=1) if floor > 1), len(floors)))
            states[0].plan = Draft((), best, floors[:best], states[0].acceptance.by_confidence())

    def _to_try(
        self,
        rests: list[int],
        costs: StepCosts,
        best: int,
        rates: list[float],
        drafts: list[list[int]],
        chances: list[list[float]],
    ) -> list[int] | None:
        """Lengths other than the best ones that are due for a try: what was seen of them is old, or nothing."""
        pause = min(LONGEST_PLAIN_PAUSE, PLAIN_PAUSE * (rates[best] / rates[0]) ** 4)
        if costs.observed - costs.plain_at > pause:
            return drafts[0]
        if len(rests) == costs.count == 1:
            if not best:
                second = max(range(1, len(rates)), key=rates.__getitem__, default=0)
                return drafts[second] if rests[0] <= 0 and second else None
            longer = best + 1 < len(drafts) and not costs.seen(best + 1)
            # even if it costs no more than this one, it has to gain something
            return drafts[best + 1] if longer and chances[0][best] > LEAST_CHANCE else None
        due = any(left <= 0 for depth, left in zip(drafts[best], rests, strict=True) if not depth)
        soon = LONGEST_PAUSE // 4 if due else -1  # together: of many rows in a step the first ones are dear
        depths = [depth or int(left <= soon) for depth, left in zip(drafts[best], rests, strict=True)]
        if not self.has_drafter or depths == drafts[best]:
            return None
        more = costs.price(sum(depths)) - costs.price(sum(drafts[best]))
        return depths if more / costs.plain <= costs.credit else None

    @staticmethod
    def _pause(state: _State, rates: list[float]) -> int:
        """Rounds without the drafter before it is tried: fewer at first, and where it would nearly pay."""
        near = max(0.0, 1 - max(rates[1:], default=0.0) / rates[0]) / FAR
        return math.ceil(min(LONGEST_PAUSE, 4 * state.rounds) * min(1.0, max(0.25, near)))

    def finish(self, sequence: Sequence) -> None:
        state, self._planned = self._states.pop(sequence, None), []
        if state is None or sequence.in_prefill:
            return
        self.learned, self._lookup_rates = state.acceptance, state.lookup.rates
        self.monitor.examine()

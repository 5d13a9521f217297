"""Who drafts in a round, and how far: what yields most tokens per millisecond, plain decoding included.

Costs are learned from the steps (`cost_model`), chances from what was accepted (`decode.draft_length`, `PromptLookup`).
Within a round the drafter may stop early, when its confidence says that another token is not worth its cost. What
prompt lookup finds is taken where it is worth more.

Exploration is bounded by credit, in plain rounds: drafting spends what it loses against plain decoding, and earns what
it gains. Where plain decoding is best, a drafted round is tried occasionally, and the other way around.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from paceline.decode.draft_length import MAX_DEPTH, Acceptance, expected_gains, stop_floors
from paceline.engine.cost_model import StepCosts
from paceline.engine.proposers import PromptLookup, Proposer, Rounds
from paceline.engine.sequence import Sequence
from paceline.types import MAX_DRAFT, NO_DRAFT, Draft

FIRST_CREDIT = 1.0  # plain rounds that drafting may lose before it has gained anything: 2 % of 60 tokens
CREDIT_SHARE = 0.008  # of the rounds since then, in addition
MOST_CREDIT = 20.0  # gains that later losses are set against
FIRST_PLAIN = 2  # rounds without drafts at first, which the others are compared with
LEAST_PAUSE = 32  # rounds from one try to the next, of what does not pay; fewer after the first ones
PLAIN_PAUSE = 16  # rounds between plain ones where drafting hardly pays; the more it gains, the surer it is
LEAST_GAIN = 1.02  # over plain decoding: less may be a mistake about the machine
FAR = 0.2  # that much slower than plain decoding is not tried any sooner
UNLIKELY = 0.1  # a guess is not looked at any further
UNSURE = 2.0  # a length not seen yet may cost that many times what is expected
REPLAN_MS, MOST_ROUNDS = 12.0, 12  # a plan serves for that long, and no more rounds


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
        notify: receives a warning if hardly any draft is accepted.
    """

    has_drafter: bool
    stops_early: bool
    notify: Callable[[str], None] = lambda _: None
    learned: Acceptance = field(default_factory=Acceptance)  # from sequences that have ended
    _lookup_rates: tuple[tuple[float, float], ...] | None = None  # likewise
    _states: dict[Sequence, _State] = field(default_factory=dict)  # of sequences with an adaptive draft length
    _costs: dict[int, StepCosts] = field(default_factory=dict)  # by the number of sequences
    _current: StepCosts = field(default_factory=lambda: StepCosts(1))  # of those in flight
    _credit: float = FIRST_CREDIT
    _planned: list[Sequence] = field(default_factory=list)  # for whom plans were made
    _rounds_left: int = 0  # until they are made anew
    _rate: float = 0.0  # tokens a millisecond that they promise
    _given_costs: list[float] = field(default_factory=list)  # milliseconds that 0, 1, ... tokens of a guess add
    _drafted: int = 0
    _accepted: int = 0
    _warned: bool = False

    def begin(self, sequence: Sequence) -> None:
        if sequence.draft_tokens is None:
            lookup = PromptLookup(self._lookup_rates) if self._lookup_rates else PromptLookup()
            self._states[sequence] = _State(self.learned.for_next_text(), lookup)

    def prepare(self, sequences: Items[Sequence]) -> None:
        self._rounds_left -= 1
        if self._rounds_left > 0 and self._planned == sequences:
            return
        self._planned = [*sequences]
        states = [self._states[s] for s in sequences if s in self._states]
        if states:
            self._current = self._costs.setdefault(len(states), StepCosts(len(states)))
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
        if not costs.observed:
            return 0
        if not self._given_costs:
            self._given_costs = [costs.price(n, n, given=True) - costs.plain for n in range(MAX_DRAFT + 1)]
        length, chance, gain = 0, 1.0, 0.0
        for i, p in enumerate(chances, start=1):
            chance *= p
            gain += chance
            worth = gain - self._rate * self._given_costs[i]
            if worth > value:
                value, length = worth, i
            elif chance < UNLIKELY:
                break
        return length

    def guess(self, sequence: Sequence, lookup: PromptLookup, most: int) -> tuple[list[int], list[float]]:
        """What prompt lookup finds, and the chance of each token given those before it."""
        lookup.read(sequence.tokens, sequence.prompt_length)
        return lookup.guess(sequence.tokens, most)

    def observe(self, rounds: Rounds, seconds: float | None) -> None:
        longest = rows = accepted = adaptive = 0
        given = False
        for sequence, result in rounds:
            state = self._states.get(sequence)
            if state is None:
                continue
            adaptive += 1
            drafted = len(result.drafted)
            if result.confidence:
                state.rounds += 1
                state.acceptance.observe(result)
                self._drafted, self._accepted = self._drafted + drafted, self._accepted + result.accepted
            else:
                state.acceptance.rested += 1
                given = given or drafted > 0
            if drafted:
                longest, rows, accepted = max(longest, drafted), rows + drafted, accepted + result.accepted
        if adaptive and seconds is not None and adaptive == len(rounds):
            costs, ms, made = self._current, seconds * 1e3, 1 + accepted / adaptive
            if rows and costs.observed:
                price = costs.price(longest, rows, given=given)
                self._credit += made - min(ms, 2 * price) / costs.plain  # an outlier counts in part
                if self._credit < FIRST_CREDIT:
                    self._rounds_left = 0
            self._credit = min(MOST_CREDIT, self._credit + CREDIT_SHARE * made)
            costs.observe(longest, rows, ms, given=given)

    def _plan(self, states: list[_State], costs: StepCosts) -> None:
        """Decide how far each of the sequences drafts in the next rounds."""
        count, plain = len(states), costs.plain
        chances = [state.acceptance.chances() for state in states]
        gains = [expected_gains(p) for p in chances]
        prices, rates, drafts = [plain], [count / plain if plain else 0.0], [[0] * count]
        known = self.has_drafter and costs.observed >= FIRST_PLAIN
        for length in range(1, min(MAX_DEPTH, 2 * costs.longest + 1) + 1 if known else 1):
            depths = [length]
            if count > 1:  # each as far as its gain is worth the time of its rows
                worth = max(rates) * (costs.price(length) - plain) / (count * length)
                depths = [max(range(length + 1), key=lambda d, gain=gain: gain[d] - worth * d) for gain in gains]  # type: ignore[misc]
            price = costs.price(length, sum(depths))
            if (price / plain - 1) * (1 if costs.seen(length) else UNSURE) > self._credit:
                break
            prices.append(price)
            rates.append((count + sum(gain[d] for gain, d in zip(gains, depths, strict=True))) / price)
            drafts.append(depths)
        best = max(range(len(rates)), key=rates.__getitem__)
        best = best if rates[best] > LEAST_GAIN * rates[0] else 0
        self._rate = rates[best]
        try_it = self._to_try(states, costs, best, rates, gains[0]) if known else None
        if try_it is not None and try_it < len(rates):
            best, self._rounds_left = try_it, 1
            if count > 1 and try_it:
                drafts[best] = [1] * count
        else:
            self._rounds_left = self._rounds(states, costs, best, rates)
            try_it = None
        for state, depth, gain in zip(states, drafts[best], gains, strict=True):
            state.plan = Draft(length=depth)
            cost = costs.price(depth, depth) - plain if depth else 0.0
            state.value = gain[depth] - self._rate * cost if try_it is None else math.inf
        if count == 1 and best and self.stops_early and try_it is None:
            floors = stop_floors(prices, chances[0], self._rate)
            best = max(best, next((j for j, floor in enumerate(floors, start=1) if floor > 1), len(floors)))
            states[0].plan = Draft((), best, floors[:best], states[0].acceptance.by_confidence())
        self._given_costs = []

    def _rounds(self, states: list[_State], costs: StepCosts, best: int, rates: list[float]) -> int:
        """How long a plan serves."""
        if costs.observed <= FIRST_PLAIN:
            return 1
        if not best:
            left = min(self._pause(state, rates) - state.acceptance.rested for state in states)
            return left if left > 0 else LEAST_PAUSE // 4  # due, but credit does not allow it yet
        return min(MOST_ROUNDS, 1 + int(REPLAN_MS / costs.plain))

    @staticmethod
    def _pause(state: _State, rates: list[float]) -> int:
        """Plain rounds before a draft is tried: fewer in the beginning, and where it would nearly pay."""
        near = max(0.0, 1 - max(rates[1:], default=0.0) / rates[0]) / FAR
        return math.ceil(min(LEAST_PAUSE, 4 * state.rounds) * min(1.0, max(0.25, near)))

    def _to_try(
        self, states: list[_State], costs: StepCosts, best: int, rates: list[float], gains: list[float]
    ) -> int | None:
        """A length other than the best one that is due for a try: what was seen of it is old, or nothing."""
        if not best:
            due = any(state.acceptance.rested >= self._pause(state, rates) for state in states)
            if len(states) > 1:
                return 1 if due and costs.price(1) / costs.plain - 1 <= self._credit else None
            return max(range(1, len(rates)), key=rates.__getitem__, default=None) if due else None
        if costs.observed - costs.plain_at > PLAIN_PAUSE * (rates[best] / rates[0]) ** 4:
            return 0
        # a longer draft costs at least as much as this one
        longer = len(states) == 1 and best < MAX_DEPTH and not costs.seen(best + 1)
        return best + 1 if longer and (1 + gains[best + 1]) > 1.03 * (1 + gains[best]) else None

    def finish(self, sequence: Sequence) -> None:
        state = self._states.pop(sequence, None)
        if state is None or sequence.in_prefill:
            return
        self.learned, self._lookup_rates = state.acceptance, state.lookup.rates
        if self._drafted >= 100 and self._accepted < 0.02 * self._drafted and not self._warned:
            self._warned = True
            self.notify(
                f"hardly any draft is accepted ({self._accepted} of {self._drafted}), so drafting rests; is this the "
                "drafter of another model, or has the model been fine-tuned? (the text is not affected)"
            )

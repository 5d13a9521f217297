"""Proposers: who drafts, and how many tokens. None of them can change the text, only how fast it comes.

A draft is accepted as far as it equals what the target samples, so a proposer may guess in any way. For each round the
proposers of an engine are asked in order; the first that answers has the round.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

from paceline.decode.draft_length import (
    REPLAN,
    SHARED_REPLAN,
    Costs,
    Drift,
    State,
    next_plan,
    next_request,
    observe,
    observe_shared,
    share_out,
    useless,
)
from paceline.engine.sequence import Sequence
from paceline.types import Draft, Result

Rounds = Items[tuple[Sequence, Result]]


class Proposer:
    """Proposes drafts. Only `propose` is needed; the other methods are told what happens."""

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        """The draft of a sequence's next round, at most `most` tokens; None leaves the round to the next proposer."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Do now what would delay the first request."""

    def ready(self, sequence: Sequence) -> bool:
        """Whether a sequence may begin while others run; if not, it waits for them to end."""
        return True

    def begin(self, sequence: Sequence) -> None:
        """A sequence is about to get a slot."""

    def prepare(self, sequences: Items[Sequence]) -> None:
        """These sequences decode in the next step."""

    def observe(self, rounds: Rounds, seconds: float | None) -> None:
        """What became of the rounds that this proposer had in a step.

        Args:
            rounds: sequences and their results.
            seconds: that the step took; None if it held other work, too.
        """

    def finish(self, sequence: Sequence) -> None:
        """A sequence has ended."""


class GrammarProposer(Proposer):
    """Proposes what a sequence's grammar leaves no choice about."""

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        tokens = sequence.grammar.forced()[:most] if sequence.grammar else ()
        return Draft(tokens) if tokens else None


@dataclass
class DrafterProposer(Proposer):
    """Leaves the draft to the backend's MTP drafter, and decides how long it is.

    A sequence drafts a fixed number of tokens, or as many as pay (`decode.draft_length`): by what rounds cost, and by
    what was accepted so far. Sequences that decode together share out drafts among themselves.

    Args:
        measure_costs: measures what rounds cost; called once, when first needed.
        stops_early: whether the drafter can stop by its confidence.
        notify: receives a warning if hardly any draft is accepted.
    """

    measure_costs: Callable[[], Costs]
    stops_early: bool
    notify: Callable[[str], None] = lambda _: None
    learned: State = field(default_factory=State)  # from sequences that have ended
    _costs: Costs | None = None
    _states: dict[Sequence, State] = field(default_factory=dict)  # of sequences with an adaptive draft length
    _shared: list[Sequence] = field(default_factory=list)  # among whom drafts were shared out
    _rounds_left: int = 0  # until they are shared out again
    _drift: Drift = field(default_factory=Drift)
    _warned: bool = False

    @property
    def costs(self) -> Costs:
        """Costs of rounds, measured when first needed."""
        if self._costs is None:
            self._costs = self.measure_costs()
        return self._costs

    def warm_up(self) -> None:
        _ = self.costs

    def ready(self, sequence: Sequence) -> bool:
        return self._costs is not None or sequence.draft_tokens is not None  # measuring takes all slots

    def begin(self, sequence: Sequence) -> None:
        if sequence.draft_tokens is None:
            self.warm_up()
            self._states[sequence] = next_request(self.learned)

    def prepare(self, sequences: Items[Sequence]) -> None:
        self._rounds_left -= 1
        if self._rounds_left > 0 and sequences == self._shared:
            return
        adaptive = [s for s in sequences if s in self._states and self.costs.shared]
        plans: list[Draft | None] = [None] * len(adaptive)
        if len(adaptive) > 1:
            plans = [*share_out([self._states[s] for s in adaptive], self.costs, self._drift)]
        drafting = any(plan and plan.length for plan in plans)
        self._shared, self._rounds_left = [*sequences], REPLAN if drafting else SHARED_REPLAN
        for sequence, plan in zip(adaptive, plans, strict=True):
            state = self._states[sequence]
            plain = state.plain_rounds + self._rounds_left * (plan is not None and not plan.length)
            self._states[sequence] = replace(state, plan=plan, plain_rounds=plain)

    def propose(self, sequence: Sequence, most: int) -> Draft:
        if sequence.draft_tokens is not None:
            return Draft(length=min(sequence.draft_tokens, most))
        state = self._states[sequence]
        plan = state.plan
        if plan is None:
            plan = next_plan(state, self.costs, self.stops_early)
            self._states[sequence] = replace(state, plan=plan)
        return plan if plan.length <= most else replace(plan, length=most, floors=plan.floors[:most])

    def observe(self, rounds: Rounds, seconds: float | None) -> None:
        adaptive = [(s, result) for s, result in rounds if s in self._states]
        if not adaptive:
            return
        alone = len(rounds) == 1
        milliseconds = seconds * 1e3 if seconds is not None else None
        for sequence, result in adaptive:
            self._states[sequence] = observe(
                self._states[sequence], self.costs, result, milliseconds if alone else None
            )
        lengths = [len(result.drafted) for _, result in adaptive]
        telling = any(lengths) or self._rounds_left % REPLAN == 0  # plain rounds are all the same
        if milliseconds and telling and not alone and len(adaptive) == len(rounds) and self.costs.shared:
            accepted = sum(result.accepted for _, result in adaptive)
            self._drift = observe_shared(self._drift, self.costs, lengths, accepted, milliseconds)

    def finish(self, sequence: Sequence) -> None:
        state = self._states.pop(sequence, None)
        if state is None or sequence.in_prefill:
            return
        self.learned = state
        if useless(state) and not self._warned:
            self._warned = True
            self.notify(
                f"hardly any draft is accepted ({state.accepted} of {state.drafted}), so drafting rests; is this the "
                "drafter of another model, or has the model been fine-tuned? (the text is not affected)"
            )

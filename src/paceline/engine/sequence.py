"""One request in flight: the only mutable state a request has."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from paceline.decode.draft_length import Costs, State, next_plan, observe
from paceline.decode.rules import Rule
from paceline.decode.sampling_params import Grammar, History
from paceline.text.stops import StopStringFilter, TokenDecoder
from paceline.types import Commit, Event, FinishReason, Float32, Line, Plan, Statistics, TokenDelta

MOST_FORCED = 15  # with the round's own token a verification of sixteen rows


@dataclass(eq=False)  # each is itself: what is in flight is found by identity
class Sequence:
    """Committed tokens, cache position, settings and statistics of one request.

    All tokens but the newest are in the cache once the prompt is read; `hidden` is the target's hidden state at the
    row that produced the newest one, which is where a drafter starts.
    """

    tokens: list[int]  # the prompt, then what was generated
    rule: Rule
    draft_tokens: int | None  # most tokens drafted a round, 0 for plain decoding; None: as many as pay
    max_tokens: int  # generated tokens at most
    limit: int  # length the cache allows, prompt included
    stop_ids: frozenset[int]
    detokenizer: TokenDecoder
    stops: tuple[str, ...] = ()
    slot: int = -1  # of the cache; -1 until it has one
    logprobs: int | None = None  # alternatives reported with each token; None for no report
    grammar: Grammar | None = None  # that the text must follow
    costs: Costs | None = None  # of rounds, needed where draft_tokens is None
    control: State = field(default_factory=State)
    cached: int = 0  # rows in the cache
    branches: set[int] = field(default_factory=set)  # lengths at which the rows are of use to other prompts
    hidden: Float32 | None = None  # [hidden]; None until the prompt is read
    finish: FinishReason | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self.history = History(self.tokens, self.grammar)
        self._text = StopStringFilter(self.detokenizer, self.stops)
        self._started = time.perf_counter()
        self._admitted = self._first_token = self._latest = self._started
        self._resumed = self._tokens = self._rounds = self._drafted = 0
        self._at_depth: list[int] = []  # drafts accepted

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.hidden is None

    def admit(self, slot: int) -> None:
        """Take a cache slot."""
        self.slot = slot
        self._admitted = time.perf_counter()

    def resume(self, cached: int) -> None:
        """Begin behind the first `cached` tokens of the prompt, whose rows are in the slot already."""
        self.cached = self._resumed = cached

    def next_chunk(self, most: int) -> list[int]:
        """The tokens of the prompt to read next, not beyond a length at which others branch off."""
        end = min([self.cached + most, *(b for b in self.branches if b > self.cached)])
        return self.tokens[self.cached : end]

    @property
    def room(self) -> int:
        """Drafts that can be of use in the next round; its own token is never drafted."""
        left = min(self.max_tokens - len(self.tokens) + self.prompt_length, self.limit - len(self.tokens))
        return max(0, left - 1)

    def forced_line(self) -> Line | None:
        """What the grammar leaves no choice about, as a draft that needs no drafter."""
        if self.grammar is None or self.reading or self.draft_tokens == 0 or self.rule.with_logits:
            return None
        tokens = self.grammar.forced()[: min(self.room, MOST_FORCED)]
        return Line(tokens, forced=True) if tokens else None

    def plan(self, early_stop: bool) -> Plan:
        """How far to draft in the next round; never further than drafts can be of use.

        Args:
            early_stop: whether the backend can stop a round by the drafter's confidence.
        """
        if self.reading:
            return Plan(0)
        room = self.room
        if self.draft_tokens is not None:
            return Plan(min(self.draft_tokens, room))
        if self.costs is None:
            return Plan(0)
        if self.control.plan is None:
            self.control = replace(self.control, plan=next_plan(self.control, self.costs, early_stop))
        plan = self.control.plan
        assert plan is not None
        return plan if plan.depth <= room else replace(plan, depth=room, floors=plan.floors[:room])

    def apply(self, commit: Commit, line: Line, hidden: Float32, seconds: float | None) -> Event:
        """Take over what a verification settled.

        Args:
            commit: accepted drafts and the target's own token.
            line: what was drafted.
            hidden: the target's hidden state at the row of the last accepted token.
            seconds: what the round took; None if it was shared with other sequences.
        """
        first = self.reading
        if self.costs and not first and not line.forced and (line.tokens or seconds):  # else there is nothing to learn
            self.control = observe(self.control, self.costs, line, commit.accepted, seconds and seconds * 1e3)
        self.cached += 1 + commit.accepted
        self.hidden = hidden
        pieces = []
        for depth, token in enumerate(commit.tokens, start=1):
            if token in self.stop_ids:
                self.finish = "stop"
                break
            self.tokens.append(token)
            report = commit.logprobs[depth - 1] if commit.logprobs else None
            pieces.append(TokenDelta(token, self._text.push(token), depth if depth <= commit.accepted else 0, report))
            if self._text.stopped:
                self.finish = "stop"
                break
            if len(self.tokens) - self.prompt_length >= self.max_tokens or len(self.tokens) >= self.limit:
                self.finish = "length"
                break
        accepted = sum(piece.depth > 0 for piece in pieces)
        self._count(first, drafts=len(line.tokens), accepted=accepted, tokens=len(pieces))
        rest = self._text.finish() if self.finish else ""
        if self._text.stopped:
            self.finish = "stop"
        return Event(tuple(pieces), len(line.tokens), accepted, self.finish, rest)

    def _count(self, first: bool, *, drafts: int, accepted: int, tokens: int) -> None:
        self._tokens += tokens
        self._latest = time.perf_counter()
        if first:
            self._first_token = self._latest
            return
        self._rounds += tokens > 0
        self._drafted += drafts
        if drafts > len(self._at_depth):
            self._at_depth += [0] * (drafts - len(self._at_depth))
        for depth in range(accepted):
            self._at_depth[depth] += 1

    @property
    def statistics(self) -> Statistics:
        """Counts and times so far."""
        return Statistics(
            prompt_tokens=self.prompt_length,
            cached_tokens=self._resumed,
            queue_seconds=max(0.0, self._admitted - self._started),
            prompt_seconds=max(0.0, self._first_token - self._started),
            tokens=self._tokens,
            seconds=self._latest - self._first_token,
            rounds=self._rounds,
            drafted=self._drafted,
            accepted=sum(self._at_depth),
            accepted_at_depth=tuple(self._at_depth),
        )

"""One request in flight: the only mutable state a request has."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paceline.decode.constraints import Grammar, constraint_of
from paceline.decode.logprobs import logprobs_of
from paceline.errors import PacelineError
from paceline.text.detokenizer import Detokenizer
from paceline.text.stops import StopStringFilter
from paceline.types import (
    MAX_DRAFT,
    Draft,
    Event,
    FinishReason,
    Result,
    SamplingParams,
    Statistics,
    TokenDelta,
    Work,
)

Deliver = Callable[[Event | Exception], None]


@dataclass(eq=False)  # each is itself: what is in flight is found by identity
class Sequence:
    """Committed tokens, KV cache slot, settings and statistics of one request.

    All tokens but the newest are in the KV cache once the prefill is over.
    """

    tokens: list[int]  # the prompt, then what was generated
    params: SamplingParams
    draft_tokens: int | None  # most tokens drafted a round, 0 for plain decoding; None: as many as pay
    max_tokens: int  # generated tokens at most
    limit: int  # length the cache allows, prompt included
    stop_ids: frozenset[int]
    detokenizer: Detokenizer
    stops: tuple[str, ...] = ()
    slot: int = -1  # of the KV cache; -1 until it has one
    logprobs: int | None = None  # alternatives reported with each token; None for no report
    grammar: Grammar | None = None  # that the text must follow
    cached: int = 0  # tokens in the KV cache
    branches: set[int] = field(default_factory=set)  # lengths at which a snapshot is of use to other prompts
    tap: Callable[[Result], None] | None = None  # sees every result, with logits: for audits and tests
    deliver: Deliver = lambda _: None  # receives each event, or the error that ended the sequence
    owner: weakref.ref[Any] | None = None  # the sequence is cancelled when it has gone
    situations: tuple[str, ...] = ()  # that may cost acceptance, as `acceptance_monitor` names them
    client: str = ""  # who shares slots with others as one
    turn: float = 0.0  # in the queue; set by the scheduler
    finish: FinishReason | None = None
    failure: PacelineError | None = None  # why it was cancelled, if not by its owner

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self._constraint = constraint_of(self.params, self.tokens, self.grammar)
        self._text = StopStringFilter(self.detokenizer, self.stops)
        self._started = time.perf_counter()
        self._admitted = self._first_token = self._latest = self._started
        self._resumed = self._tokens = self._rounds = self._drafted = 0
        self._drafted_by_engine = self._accepted_by_engine = 0
        self._at_depth: list[int] = []  # drafts accepted

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def in_prefill(self) -> bool:
        """Whether part of the prompt is still to be run."""
        return len(self.tokens) == self.prompt_length

    def admit(self, slot: int) -> None:
        """Take a slot."""
        self.slot = slot
        self._admitted = time.perf_counter()

    def resume(self, cached: int) -> None:
        """Begin after the first `cached` tokens of the prompt, which are in the slot's KV cache already."""
        self.cached = self._resumed = cached

    @property
    def room(self) -> int:
        """Drafted tokens that can be of use in the next round; its last token is never a drafted one."""
        left = min(self.max_tokens - len(self.tokens) + self.prompt_length, self.limit - len(self.tokens))
        return min(MAX_DRAFT, max(0, left - 1))

    def work(self, draft: Draft, chunk: int) -> Work:
        """What to run next: at most `chunk` tokens of the prompt, or a round with a draft.

        A chunk ends at a length at which other prompts branch off.
        """
        end = min([len(self.tokens), self.cached + chunk, *(b for b in self.branches if b > self.cached)])
        return Work(
            slot=self.slot,
            position=self.cached,
            tokens=self.tokens[self.cached : end],
            params=self.params if end == len(self.tokens) else None,
            draft=draft,
            constraint=self._constraint,
            logits=self.logprobs is not None or self.tap is not None,
        )

    def apply(self, work: Work, result: Result) -> Event | None:
        """Commit what a work gave; None if the prefill goes on."""
        first = self.in_prefill
        self.cached += len(work.tokens) + result.accepted
        if not result.sampled:
            return None
        if self.tap:
            self.tap(result)
        deltas = self._commit(result)
        accepted = sum(delta.depth > 0 for delta in deltas)
        by_drafter = bool(result.confidence)
        self._count(first, drafts=len(result.drafted), accepted=accepted, tokens=len(deltas), by_drafter=by_drafter)
        rest = self._text.finish() if self.finish else ""
        if self._text.stopped:
            self.finish = "stop"
        return Event(tuple(deltas), len(result.drafted), accepted, self.finish, rest, by_drafter)

    def _commit(self, result: Result) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        for row, token in enumerate(result.sampled):
            if token in self.stop_ids:
                self.finish = "stop"
                break
            self.tokens.append(token)
            report = None
            if self.logprobs is not None and result.logits is not None:
                report = logprobs_of(result.logits[row], token, self.logprobs, self.params.temperature)
            depth = row + 1 if row < result.accepted else 0
            deltas.append(TokenDelta(token, self._text.push(token), depth, report))
            if self._text.stopped:
                self.finish = "stop"
                break
            if len(self.tokens) - self.prompt_length >= self.max_tokens or len(self.tokens) >= self.limit:
                self.finish = "length"
                break
        return deltas

    def _count(self, first: bool, *, drafts: int, accepted: int, tokens: int, by_drafter: bool) -> None:
        self._tokens += tokens
        self._latest = time.perf_counter()
        if first:
            self._first_token = self._latest
            return
        self._rounds += tokens > 0
        self._drafted += drafts
        if not by_drafter:
            self._drafted_by_engine += drafts
            self._accepted_by_engine += accepted
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
            drafted_by_engine=self._drafted_by_engine,
            accepted_by_engine=self._accepted_by_engine,
            accepted_at_depth=tuple(self._at_depth),
        )

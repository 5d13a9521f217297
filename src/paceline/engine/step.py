"""One step of everything in flight: draft, run one batch through the target, verify, roll back.

A sequence whose prompt is still being read contributes a chunk of it; the others contribute their newest token and its
drafts. There is one path: a plain decode step is a round of no drafts, and the last chunk of a prompt ends in one too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np

from paceline.backends.base import Backend
from paceline.decode.verify import verify
from paceline.engine.sequence import Sequence
from paceline.types import Anchors, Batch, Drafts, Event, Line, Output, Plan, SamplingParams


def step(backend: Backend, sequences: Items[Sequence], chunk: int) -> list[Event | None]:
    """Advance every sequence once.

    Args:
        backend: the model pair.
        sequences: unfinished sequences, each with a slot of its own.
        chunk: most prompt tokens read a step.

    Returns:
        What each sequence gained, None for one whose prompt is not read to the end yet.
    """
    started = time.perf_counter()
    drafting = draft(backend, sequences)
    lines = drafting.lines()
    runs = [run_of(sequence, line, chunk) for sequence, line in zip(sequences, lines, strict=True)]
    output = backend.forward(batch_of(sequences, runs))
    if drafting.drafts and drafting.drafts.later:
        lines = drafting.settled().lines()
    events: list[Event | None] = []
    row = 0
    for sequence, tokens, line in zip(sequences, runs, lines, strict=True):
        if not wants_logits(sequence, tokens):
            sequence.cached += len(tokens)
            events.append(None)
            continue
        end = row + 1 + len(line.tokens)
        mine = Output(output.logits[row:end], output.hidden[row:end])
        row = end
        events.append(settle(backend, sequence, tokens, line, mine, started if len(sequences) == 1 else None))
    return events


@dataclass(frozen=True)
class Drafting:
    """What is drafted for each sequence: by its grammar, by the drafter, or nothing."""

    forced: list[Line | None]
    plans: Items[Plan] = ()  # of the sequences that draft
    drafting: Items[int] = ()  # their numbers
    drafts: Drafts | None = None

    def settled(self) -> Drafting:
        """The same with no stand-ins for tokens."""
        return self if self.drafts is None else replace(self, drafts=self.drafts.settled())

    def lines(self) -> list[Line]:
        lines = [line or Line() for line in self.forced]
        if self.drafts is None:
            return lines
        tokens, confidence, logits = self.drafts.tokens, self.drafts.confidence, self.drafts.logits
        for row, (index, plan) in enumerate(zip(self.drafting, self.plans, strict=True)):
            length = min(int(self.drafts.lengths[row]), plan.depth)
            lines[index] = Line(
                tuple(tokens[row, :length].tolist()),
                tuple(confidence[row, :length].tolist()),
                None if logits is None else logits[row, :length],
            )
        return lines


def draft(backend: Backend, sequences: Items[Sequence]) -> Drafting:
    """What is drafted for each sequence; all draft in one call."""
    forced = [sequence.forced_line() for sequence in sequences]
    if not backend.can_draft:
        return Drafting(forced)
    plans = [
        Plan(0) if line else sequence.plan(backend.stops_early)
        for sequence, line in zip(sequences, forced, strict=True)
    ]
    drafting = [index for index, plan in enumerate(plans) if plan.depth > 0]
    if not drafting:
        return Drafting(forced)
    mine = [sequences[index] for index in drafting]
    drafts = backend.draft(
        Anchors(
            slots=np.array([s.slot for s in mine], np.int32),
            positions=np.array([len(s.tokens) - 1 for s in mine], np.int32),
            tokens=np.array([s.tokens[-1] for s in mine], np.int32),
            hidden=np.stack([s.hidden for s in mine if s.hidden is not None]),
            samplings=tuple(s.rule.sampling for s in mine),
            plans=tuple(plans[index] for index in drafting),
            streams=tuple(s.rule.stream for s in mine),
            with_logits=any(s.rule.with_logits for s in mine),
        )
    )
    return Drafting(forced, tuple(plans[index] for index in drafting), drafting, drafts)


def run_of(sequence: Sequence, line: Line, chunk: int) -> list[int]:
    """The tokens a sequence runs through the target in this step, starting at its first row not in the cache."""
    if sequence.reading:
        return sequence.next_chunk(chunk)
    return [sequence.tokens[-1], *line.tokens]


def wants_logits(sequence: Sequence, tokens: list[int]) -> bool:
    """Whether a run ends a prompt or is a round; other prompt chunks only fill the cache."""
    return not sequence.reading or sequence.cached + len(tokens) == len(sequence.tokens)


def batch_of(sequences: Items[Sequence], runs: Items[list[int]]) -> Batch:
    """The rows of all runs. Wanted are every row of a round and the last row of a prompt."""
    wanted: list[bool] = []
    samplings: list[SamplingParams] = []
    for sequence, tokens in zip(sequences, runs, strict=True):
        first = len(tokens) - 1 if sequence.reading else 0
        wants = wants_logits(sequence, tokens)
        mine = [wants and row >= first for row in range(len(tokens))]
        wanted += mine
        samplings += [sequence.rule.sampling] * sum(mine)
    return Batch(
        slots=np.repeat(np.array([s.slot for s in sequences], np.int32), [len(tokens) for tokens in runs]),
        positions=np.concatenate(
            [np.arange(s.cached, s.cached + len(tokens)) for s, tokens in zip(sequences, runs, strict=True)]
        ).astype(np.int32),
        tokens=np.concatenate(runs).astype(np.int32),
        wanted=np.array(wanted, np.bool_),
        samplings=tuple(samplings),
    )


def settle(
    backend: Backend, sequence: Sequence, tokens: list[int], line: Line, output: Output, started: float | None
) -> Event:
    """Verify a round, forget the rejected rows, and take over the rest."""
    position = len(sequence.tokens) - 1
    commit = verify(output.logits, line, sequence.rule, sequence.history, position, sequence.logprobs)
    if sequence.reading:
        sequence.cached += len(tokens) - 1
    kept = sequence.cached + 1 + commit.accepted
    if commit.accepted < len(line.tokens):
        backend.truncate(sequence.slot, kept)
    seconds = None if started is None else time.perf_counter() - started
    return sequence.apply(commit, line, output.hidden[commit.accepted].copy(), seconds)

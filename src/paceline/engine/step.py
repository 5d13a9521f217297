"""One step of everything in flight: draft, run one batch through the target, verify, roll back.

A sequence whose prompt is still being read contributes a chunk of it; the others contribute their newest token and its
drafts. There is one path: a plain decode step is a round of no drafts, and the last chunk of a prompt ends in one too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items

import numpy as np

from paceline.backends.base import Backend
from paceline.decode.verify import verify
from paceline.engine.sequence import Sequence
from paceline.types import Anchors, Batch, Event, Line, Output, Plan


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
    lines = draft(backend, sequences)
    runs = [run_of(sequence, line, chunk) for sequence, line in zip(sequences, lines, strict=True)]
    output = backend.forward(batch_of(sequences, runs))
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


def draft(backend: Backend, sequences: Items[Sequence]) -> list[Line]:
    """What is drafted for each sequence, nothing where it wants nothing; all draft in one call."""
    forced = [sequence.forced_line() for sequence in sequences]
    lines = [line or Line() for line in forced]
    if not backend.can_draft:
        return lines
    plans = [
        Plan(0) if line else sequence.plan(backend.stops_early)
        for sequence, line in zip(sequences, forced, strict=True)
    ]
    drafting = [index for index, plan in enumerate(plans) if plan.depth > 0]
    if not drafting:
        return lines
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
    for row, index in enumerate(drafting):
        length = min(int(drafts.lengths[row]), plans[index].depth)
        lines[index] = Line(
            tuple(drafts.tokens[row, :length].tolist()),
            tuple(drafts.confidence[row, :length].tolist()),
            None if drafts.logits is None else drafts.logits[row, :length],
        )
    return lines


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
    wanted = []
    for sequence, tokens in zip(sequences, runs, strict=True):
        first = len(tokens) - 1 if sequence.reading else 0
        wants = wants_logits(sequence, tokens)
        wanted += [wants and row >= first for row in range(len(tokens))]
    return Batch(
        slots=np.repeat(np.array([s.slot for s in sequences], np.int32), [len(tokens) for tokens in runs]),
        positions=np.concatenate(
            [np.arange(s.cached, s.cached + len(tokens)) for s, tokens in zip(sequences, runs, strict=True)]
        ).astype(np.int32),
        tokens=np.concatenate(runs).astype(np.int32),
        wanted=np.array(wanted, np.bool_),
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

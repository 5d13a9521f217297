"""One step of everything in flight: draft, run one batch through the target, verify, roll back.

A sequence whose prompt is still being read contributes a chunk of it; the others contribute their newest token and its
drafts. There is one path: a plain decode step is a round of no drafts, and the last chunk of a prompt ends in one too.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from paceline.backends.base import Backend
from paceline.decode.verify import verify
from paceline.engine.sequence import Sequence
from paceline.types import Anchors, Batch, Event, Output


def step(backend: Backend, sequences: Items[Sequence], chunk: int) -> list[Event | None]:
    """Advance every sequence once.

    Args:
        backend: the model pair.
        sequences: unfinished sequences, each with a slot of its own.
        chunk: most prompt tokens read a step.

    Returns:
        What each sequence gained, None for one whose prompt is not read to the end yet.
    """
    drafts = draft(backend, sequences)
    lines = [line(sequence, drafted, chunk) for sequence, drafted in zip(sequences, drafts, strict=True)]
    output = backend.forward(batch_of(sequences, lines))
    events: list[Event | None] = []
    row = 0
    for sequence, tokens, drafted in zip(sequences, lines, drafts, strict=True):
        if not wants_logits(sequence, tokens):
            sequence.cached += len(tokens)
            events.append(None)
            continue
        mine = Output(output.logits[row : row + 1 + len(drafted)], output.hidden[row : row + 1 + len(drafted)])
        row += 1 + len(drafted)
        events.append(settle(backend, sequence, tokens, drafted, mine))
    return events


def draft(backend: Backend, sequences: Items[Sequence]) -> list[list[int]]:
    """Drafted tokens of each sequence, none where it wants none; all draft in one call."""
    drafting = [sequence for sequence in sequences if sequence.depth > 0] if backend.can_draft else []
    if not drafting:
        return [[] for _ in sequences]
    anchors = Anchors(
        slots=np.array([s.slot for s in drafting], np.int32),
        positions=np.array([len(s.tokens) - 1 for s in drafting], np.int32),
        tokens=np.array([s.tokens[-1] for s in drafting], np.int32),
        hidden=np.stack([s.hidden for s in drafting if s.hidden is not None]),
    )
    drafts = iter(backend.draft(anchors, max(s.depth for s in drafting)).tokens)
    return [next(drafts)[: s.depth].tolist() if s.depth > 0 else [] for s in sequences]


def line(sequence: Sequence, drafted: list[int], chunk: int) -> list[int]:
    """The tokens a sequence runs through the target in this step, starting at its first row not in the cache."""
    if sequence.reading:
        return sequence.tokens[sequence.cached : sequence.cached + chunk]
    return [sequence.tokens[-1], *drafted]


def wants_logits(sequence: Sequence, tokens: list[int]) -> bool:
    """Whether a line ends a prompt or is a round; other prompt chunks only fill the cache."""
    return not sequence.reading or sequence.cached + len(tokens) == len(sequence.tokens)


def batch_of(sequences: Items[Sequence], lines: Items[list[int]]) -> Batch:
    """The rows of all lines. Wanted are every row of a round and the last row of a prompt."""
    wanted = []
    for sequence, tokens in zip(sequences, lines, strict=True):
        first = len(tokens) - 1 if sequence.reading else 0
        wants = wants_logits(sequence, tokens)
        wanted += [wants and row >= first for row in range(len(tokens))]
    return Batch(
        slots=np.repeat(np.array([s.slot for s in sequences], np.int32), [len(tokens) for tokens in lines]),
        positions=np.concatenate(
            [np.arange(s.cached, s.cached + len(tokens)) for s, tokens in zip(sequences, lines, strict=True)]
        ).astype(np.int32),
        tokens=np.concatenate(lines).astype(np.int32),
        wanted=np.array(wanted, np.bool_),
    )


def settle(backend: Backend, sequence: Sequence, tokens: list[int], drafted: list[int], output: Output) -> Event:
    """Verify a round, forget the rejected rows, and take over the rest."""
    commit = verify(output.logits, drafted, sequence.sampling, len(sequence.tokens) - 1)
    if sequence.reading:
        sequence.cached += len(tokens) - 1
    kept = sequence.cached + 1 + commit.accepted
    if commit.accepted < len(drafted):
        backend.truncate(sequence.slot, kept)
    return sequence.apply(commit, drafted, output.hidden[commit.accepted].copy())

"""One step of everything in flight: propose, run, commit.

A sequence in prefill runs a chunk of its prompt; the others run a round: their newest token and its draft. A plain
decode step is a round without a draft, and the last chunk of a prompt ends in one, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items

from paceline.backends.base import Backend
from paceline.engine.proposers import Proposer
from paceline.engine.sequence import Sequence
from paceline.types import NO_DRAFT, Draft, Event


def step(backend: Backend, proposers: Items[Proposer], sequences: Items[Sequence], chunk: int) -> list[Event | None]:
    """Advance every sequence once.

    Args:
        backend: the model pair.
        proposers: asked in order for each draft.
        sequences: unfinished sequences, each with its slot.
        chunk: most prompt tokens of one sequence in a step.

    Returns:
        What each sequence gained, None for one whose prefill goes on.
    """
    decoding = [sequence for sequence in sequences if not sequence.in_prefill]
    for proposer in proposers:
        proposer.prepare(decoding)
    proposals = [propose(proposers, sequence) for sequence in sequences]
    started = time.perf_counter()
    works = [sequence.work(draft, chunk) for sequence, (draft, _) in zip(sequences, proposals, strict=True)]
    results = backend.run(works)
    events = [s.apply(work, result) for s, work, result in zip(sequences, works, results, strict=True)]
    seconds = time.perf_counter() - started
    makers = [by for _, by in proposals]
    for proposer in proposers:
        rounds = [(s, r) for s, r, by in zip(sequences, results, makers, strict=True) if by is proposer]
        alone = len(decoding) == len(sequences) and all(by in (proposer, None) for by in makers)
        proposer.observe(rounds, seconds if alone else None)
    return events


def propose(proposers: Items[Proposer], sequence: Sequence) -> tuple[Draft, Proposer | None]:
    """The draft of a sequence's next round, and who proposed it."""
    if not sequence.in_prefill and sequence.draft_tokens != 0:
        for proposer in proposers:
            draft = proposer.propose(sequence, sequence.room)
            if draft is not None:
                return draft, proposer
    return NO_DRAFT, None

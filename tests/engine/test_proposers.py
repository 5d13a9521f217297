"""Proposers: who has a round, and how long drafts are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.decode.draft_length import Costs, State
from paceline.engine.proposers import DrafterProposer
from paceline.engine.sequence import Sequence
from paceline.types import Draft, Result
from tests.fixtures.backends import unplaced
from tests.fixtures.scripted_backend import ScriptedBackend

ALONE_PAYS = Costs((10.0, 10.1, 10.2), 0.0, ((2, (10.0, 30.0, 50.0)),))  # drafting pays alone, not for two at once


def adaptive(count: int) -> tuple[DrafterProposer, list[Sequence]]:
    proposer = DrafterProposer(lambda: ALONE_PAYS, stops_early=False)
    sequences = [unplaced(ScriptedBackend(), [1, 2], draft_tokens=None) for _ in range(count)]
    for sequence in sequences:
        proposer.begin(sequence)
        sequence.tokens.append(3)  # past its prefill
    return proposer, sequences


def lengths(proposer: DrafterProposer, sequences: list[Sequence], steps: int) -> list[list[int]]:
    """Draft lengths of each step; nothing is ever accepted."""
    seen = []
    for _ in range(steps):
        proposer.prepare(sequences)
        drafts = [proposer.propose(s, 15) for s in sequences]
        seen.append([draft.length for draft in drafts])
        results = [Result((0,), (0,) * draft.length, (0.5,) * draft.length) for draft in drafts]
        proposer.observe(list(zip(sequences, results, strict=True)), 0.01)
    return seen


def test_a_shared_plan_of_no_drafts_is_kept() -> None:
    proposer, sequences = adaptive(2)
    assert lengths(proposer, sequences, 20) == [[0, 0]] * 20
    assert lengths(proposer, sequences[:1], 1)[0][0] > 0  # alone it drafts


@pytest.mark.parametrize("most", [0, 1, 5])
def test_drafts_are_never_longer_than_useful(most: int) -> None:
    proposer, (sequence,) = adaptive(1)
    proposer._states[sequence] = replace(State(), plan=Draft(length=3, floors=(0.1, 0.2, 2.0)))
    draft = proposer.propose(sequence, most)
    assert draft.length == min(3, most) == len(draft.floors)
    fixed = unplaced(ScriptedBackend(), [1], draft_tokens=4)
    assert proposer.propose(fixed, most).length == min(4, most)


def test_what_a_sequence_learned_is_kept_at_its_end() -> None:
    proposer, (sequence,) = adaptive(1)
    lengths(proposer, [sequence], 10)
    assert proposer.learned == State()
    proposer.finish(sequence)
    assert proposer.learned.drafted > 0
    assert proposer._states == {}
    proposer.finish(sequence)  # may be told twice
